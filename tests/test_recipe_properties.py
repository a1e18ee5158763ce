"""Recipes that nobody thought of: each is read, and is the same when read again, or gets one clear error."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mkaq.errors import UnsupportedError, UsageError
from mkaq.recipe import Recipe
from mkaq.recipe_file import load_recipe

Data = dict[str, Any]
few = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
paths = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
numbers = st.integers(1, 500)
BETWEEN = re.compile(
    r"line \d+, (calibration|merge|budget|budget\.bits|quantize\.bits|recover): "
)  # sections


def maybe(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Data]:
    """A section with some of these keys."""
    return st.fixed_dictionaries({}, optional=fields)


def fractions(**bounds: bool) -> st.SearchStrategy[float]:
    return st.floats(0, 1, **bounds)


texts = st.one_of(
    maybe(max_seq_length=st.integers(8, 4096)),
    st.fixed_dictionaries({"dataset": st.sampled_from(["text", "jsonl", "mmlu"]), "path": paths}),
)
calibrations = st.builds(lambda text, more: {**text, **more}, texts, maybe(num_samples=numbers, seed=numbers))
manifolds = maybe(
    dimensions=st.integers(1, 4),
    bandwidth=st.one_of(st.just("median"), st.floats(1e-300, 1e300)),
    alpha=fractions(),
    time=st.integers(0, 100),
)
merges = st.builds(
    lambda amount, more: {**amount, **more},
    st.one_of(
        st.fixed_dictionaries({"ratio": fractions(exclude_min=True, exclude_max=True)}),
        st.fixed_dictionaries({"layers": numbers}),
    ),
    maybe(
        order=st.sampled_from(["similarity", "back_to_front", "measured"]),
        fuse=st.sampled_from(["channels", "average", None]),
        coefficient=st.one_of(st.sampled_from(["similarity", "sigmoid", "measured", None]), fractions()),
        manifold=st.none() | manifolds,
        protect=maybe(first=st.integers(0, 9), last=st.integers(0, 9)),
    ),
)
gptqs = st.builds(
    lambda more: {"method": "gptq", **more},
    maybe(
        bits=st.sampled_from([2, 3, 4, 8]),
        group_size=st.sampled_from([-1, 16, 128]),
        sym=st.booleans(),
        target=st.sampled_from(["input", "source"]),
        damp_percent=fractions(exclude_min=True, exclude_max=True),
    ),
)
bitsandbytes = st.builds(
    lambda more: {"method": "bitsandbytes", **more},
    maybe(bits=st.sampled_from([4, 8]), double_quant=st.none() | st.booleans()),
)


def calibrated(data: Data) -> Data:
    """A recipe without a calibration that nothing would read."""
    reads = data.get("merge") or (data.get("quantize") or {}).get("method") == "gptq"
    return data if reads else {key: value for key, value in data.items() if key != "calibration"}


recipes = st.fixed_dictionaries(
    {"version": st.just(1), "name": st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,20}\Z")}
    | {"model": st.fixed_dictionaries({"path": paths}, optional={"revision": paths})},
    optional={
        "calibration": calibrations,
        "merge": st.none() | merges,
        "recover": st.none() | st.just({"method": "layerwise", "steps": 7, "learning_rate": 1e-5}),
        "quantize": st.none() | gptqs | bitsandbytes,
        "export": maybe(shard_size=st.sampled_from(["4GB", "1.5 MiB", "7"])),
        "evaluate": st.none() | maybe(perplexity=st.none() | texts),
    },
).map(calibrated)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9) | numbers, inner, max_size=3)
    ),
    max_leaves=5,
)


@given(data=recipes)
@few
def test_a_recipe_is_the_same_when_it_is_read_as_it_was_resolved(data: Data, tmp_path: Path) -> None:
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError:
        assume(False)  # sections that contradict one another
    (tmp_path / "r.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    again = load_recipe(tmp_path / "r.yaml")
    assert again == recipe and again.dump() == recipe.dump() and again.to_yaml() == recipe.to_yaml()


@st.composite
def spoiled(draw: st.DrawFn) -> tuple[Data, list[str]]:
    """A recipe in which one place holds anything, and the keys that lead there."""
    data = draw(recipes)
    holder, keys = data, [draw(st.sampled_from(sorted(data)))]
    while isinstance(inside := holder[keys[-1]], dict) and inside and draw(st.booleans()):
        holder, keys = inside, [*keys, draw(st.sampled_from(sorted(inside)))]
    holder[keys[-1]] = draw(anything)
    return data, keys


@given(case=spoiled())
@few
def test_a_wrong_value_gets_one_error_that_names_the_place(
    case: tuple[Data, list[str]], tmp_path: Path
) -> None:
    data, keys = case
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
    try:
        read = load_recipe(path)
    except (UsageError, UnsupportedError) as error:
        assert error.where == str(path) and error.exit_code in (2, 3)
        assert "line " in error.what
        assert keys[0] in error.what or BETWEEN.search(error.what)
        return
    assert Recipe.model_validate(read.dump()) == read


@given(data=anything)
@few
def test_what_is_no_recipe_is_refused(data: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: ")


@given(key=st.sampled_from(["name", "model.path", "merge.ratio", "quantize.bits", "x.y"]), text=st.text())
@few
def test_a_setting_is_taken_or_refused(key: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("{version: 1, name: x, model: {path: m}, merge: {layers: 1}, quantize: {method: gptq}}")
    try:
        recipe = load_recipe(path, [f"{key}={text}"])
    except (UsageError, UnsupportedError) as error:
        assert "--set" in str(error)
        return
    if key == "model.path":
        assert recipe.model.path == text
