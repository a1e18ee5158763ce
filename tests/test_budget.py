"""Budgets: the search on made-up perplexities, and what a recipe may ask for."""

import itertools
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from mkaq.budget import (
    Option,
    describe,
    fit_rise,
    fit_size,
    meet_budget,
    most_trials,
    options_of,
    settle,
)
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.errors import UsageError
from mkaq.plan import plan_recipe, plan_run
from mkaq.progress import Progress
from mkaq.recipe import Recipe
from mkaq.recipe_file import load_recipe
from mkaq.stages.quantize import BitsandbytesSection, GptqSection
from tests.tiny import make_model

Write = Callable[..., Path]
MEASURED = {"perplexity": {"num_samples": 4, "max_seq_length": 32}}
BIGGER = {8: 8_000, 4: 4_000, 3: 3_000, None: 16_000}


def row(bits: int | None, layers: int = 32, first: int = 0) -> list[Option]:
    """Options of a model that is `bits` and a layer's share smaller with every layer removed."""
    return [Option(gone, bits, BIGGER[bits] * (layers - gone)) for gone in range(first, layers)]


def noting(rise: Callable[[Option], float]) -> tuple[Callable[[Option], float], list[Option]]:
    """A made-up rise of perplexity, and the options for which it was asked."""
    asked: list[Option] = []

    def noted(option: Option) -> float:
        asked.append(option)
        return rise(option)

    return noted, asked


def never(option: Option) -> float:
    raise AssertionError(f"{option} was tried")


def budget_recipe(write: Write, **sections: Any) -> Recipe:
    quantize = {"method": "gptq", "group_size": 32}
    given = {"merge": {}, "quantize": quantize, "budget": {"bytes": "1GB"}, "evaluate": MEASURED}
    return load_recipe(write(**given | sections))


def test_size_is_met_by_the_fewest_layers_without_a_trial_if_nothing_else_fits() -> None:
    assert fit_size(8_000 * 30, [row(8)], never) == Option(2, 8, 8_000 * 30)
    assert fit_size(8_000 * 30 - 1, [row(8)], never).removed == 3
    assert fit_size(10**9, [row(8)], never).removed == 0
    assert fit_size(4_000, [row(8), row(4)], never) == Option(31, 4, 4_000)


@pytest.mark.parametrize(("cost_of_three", "bits"), [(0.01, 3), (0.5, 4), (2.0, 8)])
def test_size_is_met_by_the_bits_of_the_least_rise(cost_of_three: float, bits: int) -> None:
    cost = {8: 0.0, 4: cost_of_three / 4, 3: cost_of_three}
    rise, asked = noting(lambda option: cost[option.bits or 0] + 0.02 * option.removed)
    limit = 3_000 * 32
    chosen = fit_size(limit, [row(8), row(4), row(3)], rise)
    assert [(o.bits, o.removed) for o in asked] == [(8, 20), (4, 8), (3, 0)]
    assert chosen.bits == bits and chosen.bytes <= limit
    assert chosen == min(list(asked), key=rise)


def test_size_that_nothing_meets_names_the_smallest() -> None:
    with pytest.raises(UsageError) as raised:
        fit_size(2_000, [row(8), row(3), row(4)], never)
    assert raised.value.exit_code == 2 and raised.value.where == "budget.bytes"
    assert "nothing fits into 2,000 bytes" in str(raised.value)
    assert "the smallest has 3,000 (31 layers removed, 3 bits" in str(raised.value)


@pytest.mark.parametrize("most", [0, 1, 7, 15, 30, 31])
def test_rise_is_met_by_the_most_layers_found_by_bisection(most: int) -> None:
    rise, asked = noting(lambda option: 0.05 if option.removed <= most else 0.06)
    assert fit_rise(0.05, [row(None)], rise) == row(None)[most]
    assert len(asked) <= math.ceil(math.log2(33))
    assert len({option.removed for option in asked}) == len(asked)


@pytest.mark.parametrize("seed", range(8))
def test_rise_is_met_by_the_smallest_option_of_all_bits(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    by_bits = [row(8), row(4), row(3)]
    steps = {o: float(torch.rand(1, generator=generator)) * 0.02 for options in by_bits for o in options}
    offset = {8: 0.0, 4: 0.02 * (seed % 4), 3: 0.1 * (seed % 3)}

    def rise(option: Option) -> float:
        earlier = (o for o in steps if o.bits == option.bits and o.removed <= option.removed)
        return offset[option.bits or 0] + sum(steps[o] for o in earlier)

    noted, asked = noting(rise)
    fitting = [option for option in steps if rise(option) <= 0.15]
    assert fit_rise(0.15, by_bits, noted) == min(fitting, key=lambda option: option.bytes)
    assert len(asked) <= 3 * 6


def test_options_that_are_no_smaller_than_the_best_are_not_tried() -> None:
    rise, asked = noting(lambda option: 0.0 if option.bits == 8 and option.removed <= 24 else 1.0)
    assert fit_rise(0.1, [row(8), row(4)], rise) == Option(24, 8, 64_000)
    assert all(option.bytes < 64_000 for option in asked if option.bits == 4)
    assert any(option.bits == 4 for option in asked)
    rise, only = noting(lambda option: 0.0)
    assert fit_rise(0.1, [[Option(0, 3, 10)], [Option(0, 4, 20), Option(1, 4, 10)]], rise).bits == 3
    assert len(only) == 1


def test_rise_that_nothing_meets_names_the_nearest() -> None:
    rise = {8: 0.25, 4: 0.125, 3: 0.5}
    with pytest.raises(UsageError) as raised:
        fit_rise(0.05, [row(8), row(4), row(3)], lambda o: rise[o.bits or 0] + 0.01 * o.removed)
    assert raised.value.exit_code == 2 and raised.value.where == "budget.perplexity_increase"
    assert "at 5.00% or less: the best that was tried is 12.50% (0 layers removed, 4 bits" in str(
        raised.value
    )


def test_settled_recipe_has_the_option_in_place_of_the_budget(recipe: Write) -> None:
    recover = {"method": "layerwise"}
    before = budget_recipe(recipe, recover=recover, merge={"order": "back_to_front"})
    settled = settle(before, Option(2, 3, 0))
    assert settled.budget is None and settled.merge is not None and settled.recover == before.recover
    assert settled.merge.layers == 2 and settled.merge.order == "back_to_front"
    assert isinstance(settled.quantize, GptqSection) and settled.quantize.bits == 3
    assert settled.quantize.group_size == 32
    Recipe.model_validate(settled.dump())  # the settled recipe is one that a user could write
    whole = settle(before, Option(0, 8, 0))
    assert whole.merge is None and whole.recover is None and whole.budget is None
    assert isinstance(whole.quantize, GptqSection) and whole.quantize.bits == 8
    Recipe.model_validate(whole.dump())
    nf4 = budget_recipe(recipe, quantize={"method": "bitsandbytes", "bits": 8})
    assert settle(nf4, Option(1, None, 0)).quantize == nf4.quantize
    assert isinstance(nf4.quantize, BitsandbytesSection)


def test_options_are_every_number_of_bits_and_layers(recipe: Write, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", layers=6)
    source, cpu = open_checkpoint(model), torch.device("cpu")
    sections: dict[str, Any] = {"model": {"path": str(model)}, "merge": {"protect": {"first": 1, "last": 2}}}
    budget = {"bytes": "1GB", "bits": [3, 8, 4]}
    both = budget_recipe(recipe, **sections, budget=budget)
    planned = plan_recipe(both, source, cpu)
    options = list(planned.options)
    assert [(o.bits, o.removed) for o in options] == [(b, r) for b in (8, 4, 3) for r in (0, 1, 2)]
    plans = [plan_run(settle(both, option), source, cpu) for option in options]
    assert [o.bytes for o in options] == [plan.sizes[-1].bytes for plan in plans]
    assert [o.bytes for o in options[:3]] == sorted((o.bytes for o in options[:3]), reverse=True)
    assert options[0].bytes > options[3].bytes > options[6].bytes > 0
    assert planned.sizes == plans[0].sizes
    assert planned.memory_bytes == max(plan.memory_bytes for plan in plans)
    assert planned.disk_bytes == 3 * max(plan.disk_bytes for plan in plans) > 3 * plans[0].disk_bytes
    asked: list[Recipe] = []
    assert options_of(both, 6, lambda settled: asked.append(settled) or 7) == [
        Option(option.removed, option.bits, 7) for option in options
    ]
    assert asked == [settle(both, option) for option in options]

    def pairs(**changed: Any) -> list[tuple[int | None, int]]:
        changed_recipe = budget_recipe(recipe, **sections | {"budget": budget} | changed)
        return [(o.bits, o.removed) for o in plan_recipe(changed_recipe, source, cpu).options]

    assert pairs(merge=None) == [(8, 0), (4, 0), (3, 0)]
    budget = {"bytes": "1GB"}
    two = {"method": "gptq", "bits": 2, "group_size": 32}
    assert pairs(quantize=two) == [(2, 0), (2, 1), (2, 2)]
    assert pairs() == [(bits, removed) for bits in (8, 4, 3) for removed in (0, 1, 2)]
    assert pairs(quantize=None) == [(None, 1), (None, 2)]  # something has to be done
    assert pairs(quantize={"method": "bitsandbytes"}) == [(None, 0), (None, 1), (None, 2)]


def test_disk_has_room_for_all_trials(recipe: Write) -> None:
    """Every trial stays in the run's folder: no more of them are made than the plan reckons with."""
    rising = budget_recipe(recipe, budget={"perplexity_increase": "5%"})
    assert most_trials(budget_recipe(recipe), [*row(8), *row(4)]) == 2
    for layers in (1, 2, 3, 4, 7, 8, 32):
        for by_bits in ([row(8, layers)], [row(8, layers), row(4, layers)]):
            most = most_trials(rising, [option for options in by_bits for option in options])
            counts = set()
            for limits in itertools.product(range(layers + 1), repeat=len(by_bits)):
                fits = {options[0].bits: limit for options, limit in zip(by_bits, limits, strict=True)}
                rise, asked = noting(lambda o, fits=fits: 0.0 if o.removed < fits[o.bits] else 1.0)
                with suppress(UsageError):
                    fit_rise(0.5, by_bits, rise)
                counts.add(len(asked))
            assert max(counts) <= most and (len(by_bits) > 1 or max(counts) == most)


def made_up(recipe: Recipe) -> float:
    """Perplexity rises by a tenth with each layer, and by a fiftieth at 4 bits; the source has 50."""
    removed = recipe.merge.layers if recipe.merge is not None else 0
    assert removed is not None and isinstance(recipe.quantize, GptqSection)
    return 50 * (1 + 0.1 * removed + (0.02 if recipe.quantize.bits == 4 else 0))


def making(perplexity: Callable[[Recipe], float]) -> tuple[Callable[[Recipe], Any], list[Recipe]]:
    """Stands for what makes the models of a recipe, and the recipes that were made."""
    ran: list[Recipe] = []

    def make(recipe: Recipe) -> Any:
        ran.append(recipe)
        found = {"source": 50.0, "merge": 55.0, "quantize": perplexity(recipe)}
        evaluation = {stage: {"perplexity": {"perplexity": value}} for stage, value in found.items()}
        return SimpleNamespace(evaluation=evaluation, last="quantize")

    return make, ran


def option_of(recipe: Recipe) -> tuple[int | None, int]:
    """Layers removed and bits."""
    assert isinstance(recipe.quantize, GptqSection)
    return (recipe.merge.layers if recipe.merge else 0), recipe.quantize.bits


def test_search_is_recorded_and_told(recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    asking = budget_recipe(recipe, budget={"perplexity_increase": "12.5%", "bits": [8, 4]})
    make, ran = making(made_up)
    settled, record = meet_budget(asking, [*row(8, 4), *row(4, 4)], make, Progress())
    assert settled == settle(asking, Option(1, 4, 12_000))
    assert record["target"]["perplexity_increase"] == "12.5%"
    assert record["chosen"] == {"removed": 1, "bits": 4, "bytes": 12_000}
    assert len(record["tried"]) == len(ran) and len({option_of(tried) for tried in ran}) == len(ran)
    for tried, made in zip(record["tried"], ran, strict=True):
        assert made == settle(asking, Option(tried["removed"], tried["bits"], tried["bytes"]))
        assert tried["perplexity"] == made_up(made)
    lines = list(describe(record))
    assert lines[-1].startswith("chosen: 1 layer removed, 4 bits") and len(lines) == len(record["tried"]) + 1
    assert "tried 1 layer removed, 4 bits" in "\n".join(lines) and "perplexity 56.00" in "\n".join(lines)
    assert "trying 1 layer removed, 4 bits" in capsys.readouterr().err

    small = budget_recipe(recipe, budget={"bytes": "12KB", "bits": [8, 4]})
    settled, record = meet_budget(small, [*row(8, 4), *row(4, 4)], making(made_up)[0], Progress(quiet=True))
    assert settled == settle(small, Option(1, 4, 12_000))
    assert [(t["bits"], t["removed"]) for t in record["tried"]] == [(8, 3), (4, 1)]


@pytest.mark.parametrize("lost", [math.inf, math.nan])
def test_model_that_is_lost_is_never_chosen(lost: float, recipe: Write) -> None:
    asking = budget_recipe(recipe, budget={"perplexity_increase": "999999%", "bits": [8, 4]})
    make, ran = making(lambda tried: made_up(tried) if option_of(tried) == (0, 8) else lost)
    settled, record = meet_budget(asking, [*row(8, 4), *row(4, 4)], make, Progress(quiet=True))
    assert option_of(settled) == (0, 8) and len(ran) == len(record["tried"]) > 2


def test_trial_that_fails_ends_the_search(recipe: Write) -> None:
    asking = budget_recipe(recipe, budget={"perplexity_increase": "5%", "bits": [8, 4]})

    def fail(_: Recipe) -> float:
        raise KeyboardInterrupt

    make, ran = making(fail)
    with pytest.raises(KeyboardInterrupt):
        meet_budget(asking, [*row(8, 4), *row(4, 4)], make, Progress(quiet=True))
    assert len(ran) == 1


@pytest.mark.parametrize(
    ("budget", "share"),
    [("5%", 0.05), ("12.5 %", 0.125), ("0%", 0), ("150%", 1.5), (None, 0)],
)
def test_increase_is_a_share(budget: str | None, share: float, recipe: Write) -> None:
    target = {"bytes": "1MB"} if budget is None else {"perplexity_increase": budget}
    read = budget_recipe(recipe, budget=target)
    assert read.budget is not None and read.budget.increase == pytest.approx(share)
    assert read.budget.bits == [8, 4, 3]
    assert Recipe.model_validate(yaml.safe_load(read.to_yaml())) == read


@pytest.mark.parametrize(
    ("sections", "key", "message"),
    [
        ({"budget": {}}, "budget", "give either bytes or perplexity_increase"),
        ({"budget": {"bytes": "1GB", "perplexity_increase": "5%"}}, "budget", "give either bytes or"),
        ({"budget": {"bytes": "much"}}, "budget.bytes", "'much' is not a size"),
        ({"budget": {"bytes": 4}}, "budget.bytes", "valid string"),
        ({"budget": {"perplexity_increase": "5"}}, "budget.perplexity_increase", "'5'"),
        ({"budget": {"perplexity_increase": "-5%"}}, "budget.perplexity_increase", "'-5%'"),
        ({"budget": {"perplexity_increase": 0.05}}, "budget.perplexity_increase", "valid string"),
        ({"budget": {"bytes": "1GB", "bits": []}}, "budget.bits", "at least 1 item"),
        ({"budget": {"bytes": "1GB", "bits": [5]}}, "budget.bits.0", "must be 2, 3, 4 or 8, not 5"),
        ({"budget": {"size": "1GB"}}, "budget.size", "unknown key"),
        ({"merge": {"ratio": 0.25}}, "budget", "leave out merge.ratio and merge.layers"),
        ({"merge": {"layers": 1}}, "budget", "leave out merge.ratio and merge.layers"),
        ({"evaluate": None}, "budget", "it needs evaluate.perplexity"),
        ({"evaluate": {"perplexity": None}}, "budget", "it needs evaluate.perplexity"),
        ({"budget": None}, "merge", "merge needs ratio or layers, or the recipe a budget"),
    ],
)
def test_contradictions_are_refused(sections: dict[str, Any], key: str, message: str, recipe: Write) -> None:
    with pytest.raises(UsageError) as raised:
        budget_recipe(recipe, **sections)
    assert raised.value.exit_code == 2
    assert "1 fault in the recipe" in str(raised.value)
    assert f", {key}: " in str(raised.value) and message in str(raised.value)


def test_budget_may_go_without_merge_or_quantize(recipe: Write) -> None:
    assert budget_recipe(recipe, merge=None).merge is None
    assert budget_recipe(recipe, quantize=None).quantize is None
    with pytest.raises(UsageError, match=r"leave out merge\.ratio"):
        load_recipe(recipe(merge={}, budget={"bytes": "1GB"}, evaluate=MEASURED), ["merge.ratio=0.5"])
