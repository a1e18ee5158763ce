"""`--set KEY=VALUE`: the text itself where the recipe has a text, YAML elsewhere."""

from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any

import pytest

from mkaq.recipe_file import load_recipe
from mkaq.recipe_keys import known_keys, scalars_of


def at(data: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        data = data[part]
    return data


@pytest.mark.parametrize(
    "text", ["exp #3", "0123", "a: b", "1e3", "yes", "null", "~", "[x", "'x'", " x ", "x=y", "é"]
)
def test_text_is_taken_as_it_stands(text: str, recipe: Callable[..., Path]) -> None:
    assert load_recipe(recipe(), [f"model.path={text}"]).model.path == text
    data = load_recipe(recipe(), ["calibration.dataset=text", f"calibration.path={text}-"]).dump()
    assert data["calibration"]["path"] == f"{text}-"


def test_null_is_none_only_where_there_may_be_none(recipe: Callable[..., Path]) -> None:
    assert (
        load_recipe(recipe(model={"path": "m", "revision": "r"}), ["model.revision=null"]).model.revision
        is None
    )
    assert load_recipe(recipe(), ["model.revision=0123"]).model.revision == "0123"
    assert load_recipe(recipe(), ["model.revision=~"]).model.revision == "~"
    assert load_recipe(recipe(), ["name=null"]).name == "null"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("merge.layers", "2", 2),
        ("merge.coefficient", "0.25", 0.25),
        ("merge.coefficient", "sigmoid", "sigmoid"),
        ("merge.manifold", "{points: 64}", None),
        ("quantize.sym", "false", False),
        ("quantize.bits", "8", 8),
        ("quantize", "null", None),
        ("export.formats", "[safetensors]", ["safetensors"]),
        ("export.shard_size", "1GB", "1GB"),
        ("export.shard_size", "1000", "1000"),
    ],
)
def test_anything_else_is_yaml(key: str, text: str, value: Any, recipe: Callable[..., Path]) -> None:
    data = load_recipe(recipe(), [f"{key}={text}"]).dump()
    assert (
        at(data, key) == value
        if value is not None
        else at(data, key) is None or at(data, f"{key}.points") == 64
    )


def test_keys_of_unions_and_of_nothing() -> None:
    assert {"bits", "group_size", "quant_type"} <= known_keys(("quantize",))
    assert known_keys(("model", "path")) == known_keys(("zzz",)) == set()
    assert scalars_of(("evaluate", "perplexity", "path")) == {str, NoneType}
    assert scalars_of(("budget", "perplexity_increase")) == {str, NoneType}
    assert scalars_of(("name",)) == {str}
    assert scalars_of(("zzz",)) == scalars_of(("model", "path", "x")) == set()
