"""Budgets: the search for the removed layers and bits that meet a target size or perplexity."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mkaq.errors import UsageError
from mkaq.progress import Progress
from mkaq.recipe import Recipe
from mkaq.run.job import Job
from mkaq.run.quality import ratio
from mkaq.stages.quantize import GptqSection
from mkaq.units import decimal, human, parse_size


@dataclass(frozen=True)
class Option:
    """A candidate run of the search.

    Attributes:
        removed: Layers removed; 0 if nothing is merged.
        bits: Bits of GPTQ; None if the recipe does not use it.
        bytes: Size of the resulting weights.
    """

    removed: int
    bits: int | None
    bytes: int


def options_of(recipe: Recipe, num_layers: int, size_of: Callable[[Recipe], int]) -> list[Option]:
    """Every run that a recipe with a budget allows, ordered by bits, then by removed layers.

    Args:
        recipe: A recipe with a budget.
        num_layers: Layers of the source.
        size_of: The size in bytes of the weights that a recipe without a budget makes.
    """
    assert recipe.budget is not None
    widths: Sequence[int | None] = (None,)
    if isinstance(recipe.quantize, GptqSection):
        widths = sorted(set(recipe.budget.bits or [recipe.quantize.bits]), reverse=True)
    removals = [0]
    if recipe.merge is not None:
        free = num_layers - recipe.merge.protect.first - recipe.merge.protect.last
        removals = list(range(0 if recipe.quantize else 1, max(free, 1)))
    options = [Option(removed, bits, 0) for bits in widths for removed in removals]
    return [replace(option, bytes=size_of(settle(recipe, option))) for option in options]


def most_trials(recipe: Recipe, options: Sequence[Option]) -> int:
    """The largest number of options that the search runs."""
    by_bits = _by_bits(options)
    if recipe.budget is not None and recipe.budget.bytes is not None:
        return len(by_bits)
    return sum(len(row).bit_length() for row in by_bits)


def settle(recipe: Recipe, option: Option) -> Recipe:
    """The recipe with its budget replaced by an option."""
    update: dict[str, Any] = {"budget": None}
    if not option.removed:
        update |= {"merge": None, "recover": None}
    elif recipe.merge is not None:
        update["merge"] = recipe.merge.model_copy(update={"layers": option.removed})
    if option.bits is not None and recipe.quantize is not None:
        update["quantize"] = recipe.quantize.model_copy(update={"bits": option.bits})
    return recipe.model_copy(update=update)


def meet_budget(
    recipe: Recipe,
    options: Sequence[Option],
    make: Callable[[Recipe], Job],
    progress: Progress,
) -> tuple[Recipe, dict[str, Any]]:
    """The recipe that meets its budget, and the record of the search.

    A target size is met by the fewest removed layers for each number of bits; if there are several such
    options, all are tried and the lowest perplexity wins. A target perplexity is met by the smallest model:
    for each number of bits, bisection finds the most layers that can be removed, since perplexity rises with
    them. Options no smaller than the best so far are not tried.

    Args:
        recipe: A recipe with a budget.
        options: Its options.
        make: Makes and measures the models of a recipe without a budget; models made before are reused.
        progress: Reports every trial.

    Raises:
        UsageError: If no option meets the budget; the message names the closest.
    """
    budget, tried = recipe.budget, list[dict[str, Any]]()
    assert budget is not None

    def rise(option: Option) -> float:
        progress.say(f"budget: trying {_summary(option)}")
        job = make(settle(recipe, option))
        perplexity, before = (job.evaluation[of]["perplexity"]["perplexity"] for of in (job.last, "source"))
        tried.append(asdict(option) | {"perplexity": perplexity})
        times = ratio(job.evaluation, job.last)
        increase = math.inf if times is None else times - 1
        on = f"on the source's {decimal(before)}"
        progress.say(f"budget: perplexity {decimal(perplexity)}, {increase:+.1%} {on}")
        return increase

    by_bits = _by_bits(options)
    if budget.bytes is not None:
        chosen = fit_size(parse_size(budget.bytes), by_bits, rise)
    else:
        chosen = fit_rise(budget.increase, by_bits, rise)
    progress.say(f"budget: chosen: {_summary(chosen)}")
    record = {"target": budget.model_dump(mode="json"), "tried": tried, "chosen": asdict(chosen)}
    return settle(recipe, chosen), record


def fit_size(limit: int, by_bits: Sequence[Sequence[Option]], rise: Callable[[Option], float]) -> Option:
    """The option with the least rise of perplexity among those of at most `limit` bytes.

    Args:
        limit: Size in bytes.
        by_bits: Options for each number of bits, fewest removed layers first.
        rise: Relative rise of perplexity over the source's; called only if there is a choice.

    Raises:
        UsageError: If no option is small enough.
    """
    fitting = [next((o for o in row if o.bytes <= limit), None) for row in by_bits]
    chosen = [option for option in fitting if option is not None]
    if not chosen:
        least = min((option for row in by_bits for option in row), key=lambda option: option.bytes)
        raise UsageError(
            f"nothing fits into {limit:,} bytes: the smallest has {least.bytes:,} ({_summary(least)})",
            where="budget.bytes",
            fix="allow more bytes, fewer bits or fewer protected layers",
        )
    return chosen[0] if len(chosen) == 1 else min(chosen, key=rise)


def fit_rise(limit: float, by_bits: Sequence[Sequence[Option]], rise: Callable[[Option], float]) -> Option:
    """The smallest option whose rise of perplexity is at most `limit`.

    Args:
        limit: Largest relative rise over the source's perplexity.
        by_bits: Options for each number of bits, fewest removed layers first.
        rise: Relative rise of perplexity over the source's; assumed to grow with the removed layers.

    Raises:
        UsageError: If no option rises that little.
    """
    best: Option | None = None
    closest: tuple[float, Option] | None = None
    for row in by_bits:
        smaller = [option for option in row if best is None or option.bytes < best.bytes]
        low, high = -1, len(smaller)
        while high - low > 1:
            middle = (low + high) // 2
            increase = rise(smaller[middle])
            closest = min(
                closest or (increase, smaller[middle]), (increase, smaller[middle]), key=lambda pair: pair[0]
            )
            if increase <= limit:
                low, best = middle, smaller[middle]
            else:
                high = middle
    if best is None:
        assert closest is not None
        raise UsageError(
            f"nothing keeps the rise of perplexity at {limit:.2%} or less: the best that was tried is "
            f"{closest[0]:.2%} ({_summary(closest[1])})",
            where="budget.perplexity_increase",
            fix="allow more, or more bits, or give more calibration text",
        )
    return best


def describe(record: dict[str, Any]) -> Iterator[str]:
    """The trials and the choice, in readable lines."""
    for row in record["tried"]:
        option = Option(row["removed"], row["bits"], row["bytes"])
        yield f"tried {_summary(option)}: perplexity {decimal(row['perplexity'])}"
    yield f"chosen: {_summary(Option(**record['chosen']))}"


def _by_bits(options: Sequence[Option]) -> list[list[Option]]:
    widths = dict.fromkeys(option.bits for option in options)
    return [[option for option in options if option.bits == bits] for bits in widths]


def _summary(option: Option) -> str:
    summary = f"{option.removed} layer{'s' * (option.removed != 1)} removed"
    if option.bits is not None:
        summary += f", {option.bits} bits"
    return f"{summary}, {human(option.bytes)}"
