"""The model card: what hubs take as base_model, and nothing of the user's machine."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from mkaq.card import model_card
from mkaq.checkpoint.hub_id import hub_id_of, is_hub_id
from mkaq.checkpoint.resolve import BUILTIN
from mkaq.manifest import read_manifest
from tests.runs import Mkaq, one_message
from tests.tiny import edit_config, write_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = ["meta-llama/Llama-3.1-8B", "a/b", "org_1/name.v2", "Qwen/Qwen2.5-0.5B"]
NO_IDS = [
    "gpt2",
    "/models/llama",
    "./a/b",
    "~/a",
    "a/b/c",
    "https://hf.co/a/b",
    "a/b ",
    "-a/b",
    "a/.b",
    "a/b.",
]
NO_IDS += ["a--b/c", "a/b..c", "é/b", "a/b\n", f"a/{'b' * 97}", "builtin:x/y", "", "a/", "a/b.git"]


@pytest.fixture
def card_of(model: Path, text: Path, mkaq: Mkaq, tmp_path: Path) -> Callable[..., tuple[Any, str]]:
    """Runs over a copy of a model that lies somewhere; gives the card's data, and the text of it."""

    def run(place: str, config: dict[str, Any] | None = None, **named: Any) -> tuple[Any, str]:
        folder = tmp_path / place
        if not folder.exists():
            shutil.copytree(model, folder)
        edit_config(folder, **(config or {}))
        quantize = named.pop("quantize", {"method": "bitsandbytes", "bits": 8})
        recipe = write_recipe(tmp_path / "r.yaml", folder, text, merge=None, quantize=quantize, evaluate=None)
        data = yaml.safe_load(recipe.read_text())
        recipe.write_text(yaml.safe_dump({**data, "model": {"path": str(folder), **named}}))
        outcome = mkaq("run", recipe, "--output", tmp_path / "run")
        assert outcome.code == 0, outcome.err
        path = tmp_path / "run" / "artifact" / "README.md"
        assert str(tmp_path) not in path.read_text() and "someone" not in path.read_text()
        return ModelCard.load(path).data, path.read_text()

    return run


def test_folder_that_says_nothing_has_no_base_model(card_of: Callable[..., tuple[Any, str]]) -> None:
    data, body = card_of("home/someone/models/my-llama")
    assert data.base_model is None and "base_model_relation" not in data.to_dict()
    assert "a local model (`my-llama`)" in body and "`model.base_model` in the recipe" in body


def test_recipe_names_the_base_model(card_of: Callable[..., tuple[Any, str]], tmp_path: Path) -> None:
    told = {"_name_or_path": "other/llama"}
    data, body = card_of("home/someone/llama", told, base_model="org/llama-3")
    assert data.base_model == "org/llama-3" and data.to_dict()["base_model_relation"] == "quantized"
    assert "Made from `org/llama-3` by" in body and "recipe" not in body
    manifest = read_manifest(tmp_path / "run" / "artifact")
    assert manifest.source.base_model == manifest.recipe["model"]["base_model"] == "org/llama-3"


def test_snapshot_of_the_hub_names_it(card_of: Callable[..., tuple[Any, str]]) -> None:
    data, _ = card_of("hub/models--org--llama-3/snapshots/0123abc")
    assert data.base_model == "org/llama-3"


@pytest.mark.parametrize(
    ("folder", "named", "expected"),
    [
        ("Llama-3", "org/llama-3", "org/llama-3"),
        ("my-tuned-model", "org/llama-3", None),  # what it was tuned from is another model
        ("llama-3", "/home/someone/llama-3", None),
        ("llama-3", "home/someone/llama-3", None),
        ("llama-3", ["org/llama-3"], None),
        ("models--org--x/snapshots", "org/x", None),
        ("models--../snapshots/a", "org/x", None),
    ],
)
def test_folder_that_bears_the_name_in_its_config(
    folder: str, named: object, expected: str | None, tmp_path: Path
) -> None:
    assert hub_id_of(tmp_path / folder, {"_name_or_path": named}) == expected


@pytest.mark.parametrize("text", IDS)
def test_ids(text: str) -> None:
    validate_repo_id(text)
    assert is_hub_id(text)


@pytest.mark.parametrize("text", [*NO_IDS, None, 5])
def test_no_ids(text: object, model: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    assert not is_hub_id(text)
    if isinstance(text, str):
        recipe = {"version": 1, "name": "x", "model": {"path": str(model), "base_model": text}}
        (tmp_path / "r.yaml").write_text(json.dumps(recipe))
        one_message(mkaq("plan", tmp_path / "r.yaml"), 2, "model.base_model", "a hub id")


@pytest.mark.parametrize("path", [".", "..", "/", "~", "~/", "/home/someone/m/.."])
def test_folder_without_a_name(path: str, done: Path) -> None:
    manifest = read_manifest(done / "artifact")
    source = manifest.source.model_copy(update={"path": path})
    assert "Made from a local model by" in model_card(manifest.model_copy(update={"source": source}))


def test_builtin_model_is_named(done: Path) -> None:
    manifest = read_manifest(done / "artifact")
    source = manifest.source.model_copy(update={"path": next(iter(BUILTIN))})
    card = model_card(manifest.model_copy(update={"source": source}))
    assert "Made from `builtin:tiny-llama` by" in card and "base_model:" not in card


def test_manifests_from_before_are_read(done: Path, tmp_path: Path, mkaq: Mkaq) -> None:
    from tests.runs import forge

    copy = shutil.copytree(done / "artifact", tmp_path / "artifact")
    forge(copy, lambda manifest: manifest["source"].pop("base_model"))
    assert read_manifest(copy).source.base_model is None
