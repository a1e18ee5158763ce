"""A setting that is recorded is obeyed, or it is refused; and a resolved recipe is the same recipe."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mkaq.arch.families import FAMILIES
from mkaq.checkpoint.resolve import BUILTIN, resolve_model
from mkaq.errors import UsageError
from mkaq.recipe import Recipe
from mkaq.recipe_file import load_recipe
from mkaq.stages.analyze import ManifoldSection
from mkaq.stages.quantize import GptqSection
from tests.runs import Mkaq, one_message

BUDGET = {"bytes": "1GB"}
MEASURED = {"perplexity": {"dataset": "builtin"}}
NF4 = {"method": "bitsandbytes"}
POINTS = {"points": 128}


def resolved(**sections: Any) -> Recipe:
    """A recipe, which must be the same when its resolved form is read again."""
    found = Recipe.model_validate({"version": 1, "name": "x", "model": {"path": "m"}, **sections})
    again = Recipe.model_validate(yaml.safe_load(found.to_yaml()))
    assert again == found and again.dump() == found.dump()
    return found


@pytest.mark.parametrize(
    ("section", "fuse", "coefficient", "manifold"),
    [
        ({}, None, None, None),
        ({"coefficient": None, "manifold": None}, None, None, None),
        ({"order": "similarity"}, None, None, ManifoldSection()),
        ({"order": "similarity", "manifold": POINTS}, None, None, ManifoldSection(points=128)),
        ({"coefficient": 0.3}, "average", 0.3, None),
        ({"fuse": "average"}, "average", "measured", None),
        ({"coefficient": "sigmoid"}, "average", "sigmoid", ManifoldSection()),
        ({"order": "measured", "coefficient": "measured"}, "average", "measured", None),
        ({"order": "back_to_front", "coefficient": 0.5}, "average", 0.5, ManifoldSection()),
        (
            {"fuse": "channels", "order": "back_to_front", "manifold": POINTS},
            "channels",
            None,
            ManifoldSection(points=128),
        ),
        ({"fuse": "channels", "order": "similarity"}, "channels", None, ManifoldSection()),
        ({"fuse": "channels", "order": "measured"}, "channels", None, None),
    ],
)
def test_coefficient_and_manifold_are_there_where_they_are_read(
    section: dict[str, Any], fuse: str | None, coefficient: Any, manifold: ManifoldSection | None
) -> None:
    merge = resolved(merge={"layers": 1, **section}).merge
    assert merge is not None and merge.order == section.get("order", "measured")
    assert (merge.fuse, merge.coefficient, merge.manifold) == (fuse, coefficient, manifold)


@pytest.mark.parametrize(
    ("family", "section", "fuse", "coefficient"),
    [
        ("llama", {}, "channels", None),
        ("gemma2", {}, "average", "measured"),
        ("gemma2", {"order": "similarity"}, "average", "measured"),
        ("llama", {"fuse": "average"}, "average", "measured"),
        ("llama", {"coefficient": "sigmoid"}, "average", "sigmoid"),
        ("gemma2", {"fuse": "channels"}, "channels", None),  # asked for by name: refused later, by name
    ],
)
def test_a_merge_of_which_nothing_is_said_is_what_measured_best(
    family: str, section: dict[str, Any], fuse: str, coefficient: Any
) -> None:
    recipe = resolved(merge={"layers": 1, **section})
    assert recipe.recover is not None and recipe.recover.method == "layerwise"
    merge = recipe.fitted(FAMILIES[family]).merge
    assert merge is not None and (merge.fuse, merge.coefficient) == (fuse, coefficient)
    assert resolved(merge=merge.model_dump()).merge == merge


def test_recovery_is_left_out_where_the_recipe_says_so() -> None:
    assert resolved(merge={"layers": 1}, recover=None).recover is None
    assert resolved(quantize=NF4).recover is None


@pytest.mark.parametrize(
    ("sections", "bits", "tried"),
    [
        ({"quantize": {"method": "gptq"}}, 4, [8, 4, 3]),
        ({"quantize": {"method": "gptq", "bits": None}}, 4, [8, 4, 3]),
        ({"quantize": {"method": "gptq"}, "budget": {**BUDGET, "bits": [3, 2]}}, 4, [3, 2]),
        ({"quantize": {"method": "gptq", "bits": 3}}, 3, None),
        ({"quantize": NF4}, 4, None),
        ({"quantize": None}, None, None),
    ],
)
def test_a_budget_s_bits_stand_in_one_place(sections: dict[str, Any], bits: int | None, tried: Any) -> None:
    found = resolved(**{"merge": {}, "evaluate": MEASURED, "budget": BUDGET, **sections})
    assert found.budget is not None and found.budget.bits == tried
    assert bits is None or (found.quantize is not None and found.quantize.bits == bits)
    if isinstance(found.quantize, GptqSection):
        assert ("bits" in found.dump()["quantize"]) == (tried is None)


def test_calibration_is_recorded_only_where_it_is_read() -> None:
    assert "calibration" not in resolved(quantize=NF4).dump()
    assert "calibration" not in resolved(quantize=NF4, calibration=None).dump()
    assert resolved(quantize={"method": "gptq"}, calibration={"seed": 3}).dump()["calibration"]["seed"] == 3
    assert resolved(merge={"layers": 1}, quantize=NF4).dump()["calibration"]["num_samples"] == 128


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"merge": {"layers": 1, "fuse": "channels", "coefficient": "similarity"}},
            "coefficient is read with",
        ),
        (
            {"merge": {"layers": 1, "fuse": "channels", "order": "measured", "manifold": {}}},
            "manifold is read with",
        ),
        (
            {"merge": {"layers": 1, "order": "measured", "coefficient": 0.5, "manifold": POINTS}},
            "manifold is read",
        ),
        ({"merge": {}, "quantize": NF4, "budget": {**BUDGET, "bits": [4]}}, "budget.bits is read with"),
        ({"merge": {}, "quantize": None, "budget": {**BUDGET, "bits": [4]}}, "budget.bits is read with"),
        (
            {"quantize": {"method": "gptq", "bits": 4}, "merge": {}, "budget": {**BUDGET, "bits": [4, 3]}},
            "quantize.bits fixes what budget.bits leaves open",
        ),
        ({"merge": None, "quantize": NF4, "calibration": {"seed": 1}}, "nothing reads calibration"),
    ],
)
def test_what_nothing_reads_is_refused(
    sections: dict[str, Any], message: str, tmp_path: Path, mkaq: Mkaq
) -> None:
    data = {
        "version": 1,
        "name": "x",
        "model": {"path": "builtin:tiny-llama"},
        "evaluate": MEASURED,
        **sections,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    one_message(mkaq("plan", tmp_path / "recipe.yaml"), 2, message)


def test_revision_of_what_is_here_is_refused(recipe: Callable[..., Path], mkaq: Mkaq, tiny: Path) -> None:
    for path in (str(tiny), "builtin:tiny-llama"):
        outcome = mkaq("plan", recipe(model={"path": path, "revision": "main"}))
        one_message(outcome, 2, "model.revision", path, "no revision 'main'")
        with pytest.raises(UsageError):
            resolve_model(path, "main")
    assert resolve_model("builtin:tiny-llama") == BUILTIN["builtin:tiny-llama"]


def test_advice_of_the_shipped_recipes_works() -> None:
    """`budget` in the place of merge.ratio, with or without quantize.bits; averages, not fusing."""
    settings = ["merge.ratio=null", "budget.perplexity_increase=10%"]
    for name in ("llama3_8b_int4", "tiny_llama_int4"):
        path = Path(__file__).parent.parent / "recipes" / f"{name}.yaml"
        fixed, free = load_recipe(path, settings), load_recipe(path, [*settings, "quantize.bits=null"])
        assert fixed.budget is not None and fixed.budget.bits is None
        assert free.budget is not None and free.budget.bits == [8, 4, 3]
        averaged = load_recipe(path, ["merge.fuse=average", "merge.order=similarity"]).merge
        assert averaged is not None and averaged.coefficient == "measured" and averaged.manifold is not None
