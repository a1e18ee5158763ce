"""Shared fixtures: two finished runs, a damaged model, a folder to run in, and how a recipe is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bad_input.damage import Damage
from tests.counts import INPUTS
from tests.runs import Mkaq, Outcome, one_message, run_quietly, tree
from tests.tiny import PROTECT, write_recipe

NO_INPUTS = {"test_bad_run.py"}  # command lines, folders and interrupts


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread: None) -> None:
    """For every test here."""


@pytest.fixture
def mkaq(mkaq: Mkaq, request: pytest.FixtureRequest) -> Mkaq:
    """Runs a command line; counts the input of a test if it is refused: exit code 2 to 5, and one message."""
    properties = request.node.user_properties

    def invoke(*arguments: object) -> Outcome:
        outcome = mkaq(*arguments)
        refused = outcome.code in (2, 3, 4, 5) and outcome.err.count("mkaq: ") == 1
        if refused and not properties and request.path.name not in NO_INPUTS:
            properties.append((INPUTS, 1))
        return outcome

    return invoke


@pytest.fixture(scope="session")
def earlier(tmp_path_factory: pytest.TempPathFactory, model: Path, text: Path) -> Path:
    """A folder with a finished run of another recipe. Not to be changed: copy it first."""
    folder = tmp_path_factory.mktemp("earlier")
    merge = {"layers": 1, **PROTECT, "coefficient": 0.3}
    quantize = {"method": "gptq", "bits": 8, "group_size": 64}
    recipe = write_recipe(folder / "recipe.yaml", model, text, name="earlier", merge=merge, quantize=quantize)
    recipe.write_text(recipe.read_text().replace("num_samples: 8", "num_samples: 9"))
    return run_quietly(recipe, folder / "run")


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path, text: Path) -> Path:
    """A run of the recipe of `recipe` that nothing disturbed. Not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    return run_quietly(write_recipe(folder / "recipe.yaml", model, text), folder / "run")


@pytest.fixture
def recipe(tmp_path: Path, model: Path, text: Path) -> Callable[..., Path]:
    """Writes a recipe; keyword arguments replace whole sections."""
    return lambda **sections: write_recipe(tmp_path / "recipe.yaml", model, text, **sections)


@pytest.fixture
def folder(earlier: Path, tmp_path: Path) -> Path:
    """A copy of the earlier run's folder, to run in."""
    return shutil.copytree(earlier, tmp_path / "run", symlinks=True)


@pytest.fixture
def refused(mkaq: Mkaq, recipe: Callable[..., Path], earlier: Path) -> Callable[..., Outcome]:
    """Runs a recipe that must be refused before anything is written, in a folder with an earlier run."""

    def check(code: int, *words: str, arguments: tuple[object, ...] = (), **sections: Any) -> Outcome:
        path = sections.pop("path", None) or recipe(**sections)
        before = tree(earlier)
        outcome = mkaq("run", path, "--output", earlier, *arguments)
        one_message(outcome, code, *words)
        assert outcome.err.startswith("mkaq: ")
        assert tree(earlier) == before
        return outcome

    return check


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Callable[[Damage], Path]:
    """A damaged copy of the model."""

    def make(damage: Damage) -> Path:
        copy = shutil.copytree(model, tmp_path / "model")
        damage(copy)
        return copy

    return make
