"""A budget instead of a ratio: the run that meets a size or a perplexity, merging and bits together."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mkaq.errors import UsageError
from mkaq.progress import Progress
from mkaq.recipe import Recipe
from mkaq.run.job import Job
from mkaq.stages.quantize import GptqSection
from mkaq.units import human, parse_size


@dataclass(frozen=True)
class Option:
    """A run that could be the answer.

    Attributes:
        removed: Layers that go; 0: nothing is merged.
        bits: Of GPTQ; None if the recipe does not use it.
        bytes: Of the weights that come out.
    """

    removed: int
    bits: int | None
    bytes: int


def options_of(recipe: Recipe, num_layers: int, size_of: Callable[[Recipe], int]) -> list[Option]:
    """Every run that a recipe with a budget allows, by bits, then by layers removed.

    Args:
        recipe: With a budget.
        num_layers: Of the source.
        size_of: Bytes of the weights that a recipe without a budget makes.
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
    """How many options are run at most."""
    by_bits = _by_bits(options)
    if recipe.budget is not None and recipe.budget.bytes is not None:
        return len(by_bits)
    return sum(len(row).bit_length() for row in by_bits)


def settle(recipe: Recipe, option: Option) -> Recipe:
    """The recipe with an option in the place of its budget."""
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

    A size is met by the fewest removed layers for each number of bits; where there are several such
    runs, all are tried and the lowest perplexity wins. A rise of perplexity is met by the smallest
    model: for each number of bits the most removed layers are found by bisection, since perplexity
    rises with them; runs that are no smaller than the best so far are not tried.

    Args:
        recipe: With a budget.
        options: Its options.
        make: Makes and measures the models of a recipe without a budget; what was made before is found.
        progress: Told of every trial.

    Raises:
        UsageError: If no option meets the budget; it says what comes nearest.
    """
    budget, tried = recipe.budget, list[dict[str, Any]]()
    assert budget is not None

    def rise(option: Option) -> float:
        progress.say(f"budget: trying {_tell(option)}")
        job = make(settle(recipe, option))
        made, source = (float(job.evaluation[of]["perplexity"]["perplexity"]) for of in (job.last, "source"))
        tried.append(asdict(option) | {"perplexity": made})
        progress.say(f"budget: perplexity {made:.2f}, the source's {source:.2f}")
        return made / source - 1 if math.isfinite(made) else math.inf

    by_bits = _by_bits(options)
    if budget.bytes is not None:
        chosen = fit_size(parse_size(budget.bytes), by_bits, rise)
    else:
        chosen = fit_rise(budget.increase, by_bits, rise)
    progress.say(f"budget: {_tell(chosen)}")
    record = {"target": budget.model_dump(mode="json"), "tried": tried, "chosen": asdict(chosen)}
    return settle(recipe, chosen), record


def fit_size(limit: int, by_bits: Sequence[Sequence[Option]], rise: Callable[[Option], float]) -> Option:
    """The option of the least rise of perplexity whose weights have at most `limit` bytes.

    Args:
        limit: Bytes.
        by_bits: Options for each number of bits, by rising number of removed layers.
        rise: Of perplexity over the source's, as a share; asked only where there is a choice.

    Raises:
        UsageError: If none is so small.
    """
    fitting = [next((o for o in row if o.bytes <= limit), None) for row in by_bits]
    chosen = [option for option in fitting if option is not None]
    if not chosen:
        least = min((option for row in by_bits for option in row), key=lambda option: option.bytes)
        raise UsageError(
            f"nothing fits into {limit:,} bytes: the smallest has {least.bytes:,} ({_tell(least)})",
            where="budget.bytes",
            fix="allow more bytes, fewer bits or fewer protected layers",
        )
    return chosen[0] if len(chosen) == 1 else min(chosen, key=rise)


def fit_rise(limit: float, by_bits: Sequence[Sequence[Option]], rise: Callable[[Option], float]) -> Option:
    """The smallest option whose rise of perplexity is at most `limit`.

    Args:
        limit: As a share of the source's perplexity.
        by_bits: Options for each number of bits, by rising number of removed layers.
        rise: Of perplexity over the source's, as a share; taken to rise with the layers removed.

    Raises:
        UsageError: If none rises so little.
    """
    best: Option | None = None
    nearest: tuple[float, Option] | None = None
    for row in by_bits:
        smaller = [option for option in row if best is None or option.bytes < best.bytes]
        low, high = -1, len(smaller)
        while high - low > 1:
            at = (low + high) // 2
            found = rise(smaller[at])
            nearest = min(nearest or (found, smaller[at]), (found, smaller[at]), key=lambda pair: pair[0])
            if found <= limit:
                low, best = at, smaller[at]
            else:
                high = at
    if best is None:
        assert nearest is not None
        raise UsageError(
            f"nothing keeps the rise of perplexity at {limit:.2%} or less: the best that was tried is "
            f"{nearest[0]:.2%} ({_tell(nearest[1])})",
            where="budget.perplexity_increase",
            fix="allow more, or more bits, or give more calibration text",
        )
    return best


def describe(record: dict[str, Any]) -> Iterator[str]:
    """What was tried, and the choice, in lines for a person."""
    for row in record["tried"]:
        option = Option(row["removed"], row["bits"], row["bytes"])
        yield f"tried {_tell(option)}: perplexity {row['perplexity']:.2f}"
    yield f"chosen: {_tell(Option(**record['chosen']))}"


def _by_bits(options: Sequence[Option]) -> list[list[Option]]:
    widths = dict.fromkeys(option.bits for option in options)
    return [[option for option in options if option.bits == bits] for bits in widths]


def _tell(option: Option) -> str:
    told = f"{option.removed} layer{'s' * (option.removed != 1)} removed"
    if option.bits is not None:
        told += f", {option.bits} bits"
    return f"{told}, {human(option.bytes)}"
