"""Shared fixtures: the command line as a user types it, tiny models, recipes."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from mkaq.cli import main
from tests import runs
from tests.counts import closing_table
from tests.runs import Mkaq, Outcome, run_quietly
from tests.tiny import SIMILAR, make_model, write_recipe, write_text

QUICK = (  # the pure functions, and one run through the command line
    "arch budget end_to_end finite gptq gram groups hessian hold_out layers least_squares lock manifold "
    "packing progress publish recipe_keys recipe_rules runtimes segment shuffle similarity text"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what `make quick` runs."""
    quick = {f"test_{name}.py" for name in QUICK.split()}
    for item in items:
        if item.path.name in quick:
            item.add_marker("quick")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Closes with what the tests of reliability counted."""
    for line in closing_table(terminalreporter.stats.get("passed", [])):
        terminalreporter.write_line(line)


@pytest.fixture
def mkaq(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Mkaq:
    """Runs a command line in this process: mkaq("run", path, "--set", "merge.layers=1")."""

    def invoke(*arguments: object) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["mkaq", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), captured.out, captured.err)

    return invoke


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread for a module's tests: `pytestmark = pytest.mark.usefixtures("one_thread")`."""
    with runs.one_thread():
        yield


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file. Not to be changed: copy it first."""
    return write_text(tmp_path_factory.mktemp("text") / "topics.txt")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 3-layer Llama. Not to be changed: copy it first."""
    return make_model(tmp_path_factory.mktemp("small") / "model", layers=3)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 4-layer Llama. Not to be changed: copy it first."""
    return make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory, model: Path, text: Path) -> Path:
    """The recipe of `done`."""
    return write_recipe(tmp_path_factory.mktemp("recipe") / "recipe.yaml", model, text)


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory, plain: Path) -> Path:
    """A finished run. Not to be changed: copy it first."""
    return run_quietly(plain, tmp_path_factory.mktemp("done") / "run")


@pytest.fixture
def copy(done: Path, tmp_path: Path) -> Path:
    """A finished run to change; the artifact below it."""
    return shutil.copytree(done, tmp_path / "run", symlinks=True)


@pytest.fixture
def recipe(tmp_path: Path, tiny: Path) -> Callable[..., Path]:
    """Writes a small recipe for the tiny model; keyword arguments replace whole sections."""

    def write(**sections: Any) -> Path:
        data: dict[str, Any] = {
            "version": 1,
            "name": "test",
            "model": {"path": str(tiny)},
            "calibration": {"dataset": "builtin", "num_samples": 8, "max_seq_length": 32},
            "merge": {"layers": 1, **SIMILAR},
            "recover": None,
            "quantize": {"method": "gptq", "bits": 4, "group_size": 32},
        }
        data.update(sections)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        return path

    return write
