"""A budget instead of a ratio: the run that meets a size or a perplexity, merging and bits together."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mkaq.checkpoint.reader import Checkpoint
from mkaq.errors import UsageError, VerificationError
from mkaq.files import is_blank, replace_json
from mkaq.progress import Progress
from mkaq.recipe import GptqSection, Recipe
from mkaq.run.plan import RunPlan, plan_run
from mkaq.run.result import RunResult
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


def options_of(recipe: Recipe, source: Checkpoint) -> list[Option]:
    """Every run that a recipe with a budget allows, by bits, then by layers removed."""
    assert recipe.budget is not None
    widths: Sequence[int | None] = (None,)
    if isinstance(recipe.quantize, GptqSection):
        widths = sorted(set(recipe.budget.bits or [recipe.quantize.bits]), reverse=True)
    removals = [0]
    if recipe.merge is not None:
        free = source.num_layers - recipe.merge.protect.first - recipe.merge.protect.last
        removals = list(range(0 if recipe.quantize else 1, max(free, 1)))
    return [_sized(recipe, source, removed, bits) for bits in widths for removed in removals]


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


def plan_budget(
    recipe: Recipe,
    source: Checkpoint,
    device: torch.device,
    limit: int | None = None,
    processes: int = 1,
) -> tuple[list[Option], RunPlan]:
    """Every option of a recipe, none if it has no budget, and the plan that has room for each.

    Raises:
        UsageError: If there is no option, or as `plan_run`.
        UnsupportedError: As `plan_run`.
    """
    if recipe.budget is None:
        return [], plan_run(recipe, source, device, limit, processes)
    options = options_of(recipe, source)
    if not options:
        raise UsageError("no layer may be merged and nothing is quantized", where="budget")
    plans = [plan_run(settle(recipe, option), source, device, limit) for option in options]
    largest = max(plans, key=lambda plan: plan.sizes[-1].bytes)
    stages = dict.fromkeys(stage for plan in plans for stage in plan.memory)
    memory = {stage: max(plan.memory.get(stage, 0) for plan in plans) for stage in stages}
    disk = max(plan.disk_bytes for plan in plans)
    place = max((plan.place for plan in plans), key=("device", "host", "files").index)
    host = max(plan.host_bytes for plan in plans)
    return options, replace(largest, memory=memory, disk_bytes=disk, place=place, host_bytes=host)


class Trials:
    """The runs that are tried, kept in a file, so that an interrupted search goes on where it was.

    Args:
        path: Of the file.
        key: A digest of all that the stages of a recipe without a budget depend on.
        run: Runs such a recipe as far as its last model.
        progress: Told of what was lost in a power cut.
    """

    def __init__(
        self,
        path: Path,
        key: Callable[[Recipe], str],
        run: Callable[[Recipe], RunResult],
        progress: Progress,
    ) -> None:
        self._path, self._key, self._run, self._progress = path, key, run, progress

    def __call__(self, recipe: Recipe) -> tuple[float, float]:
        """The perplexity of what a recipe makes, and of its source: looked up or measured.

        Raises:
            VerificationError: If the file is damaged.
        """
        known, key = self._read(), self._key(recipe)
        if key not in known:
            result = self._run(recipe)
            known[key] = [result.perplexity, result.source_perplexity]
            replace_json(self._path, known)
        return known[key][0], known[key][1]

    def _read(self) -> dict[str, list[float]]:
        try:
            if is_blank(self._path):
                self._progress.say(f"{self._path} is blank, as after a power cut: the search begins anew")
                return {}
            known = json.loads(self._path.read_text())
            return {key: [float(made), float(source)] for key, (made, source) in known.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise VerificationError(f"is damaged: {error}", where=self._path, fix="delete it") from None


def meet_budget(
    recipe: Recipe,
    options: Sequence[Option],
    perplexities: Callable[[Recipe], tuple[float, float]],
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
        perplexities: Of what a recipe makes, and of its source.
        progress: Told of every trial.

    Raises:
        UsageError: If no option meets the budget; it says what comes nearest.
    """
    budget, tried = recipe.budget, list[dict[str, Any]]()
    assert budget is not None

    def rise(option: Option) -> float:
        progress.say(f"budget: trying {_tell(option)}")
        made, source = perplexities(settle(recipe, option))
        tried.append(asdict(option) | {"perplexity": made})
        progress.say(f"budget: perplexity {made:.2f}, the source's {source:.2f}")
        return made / source - 1 if math.isfinite(made) else math.inf

    by_bits = [[o for o in options if o.bits == bits] for bits in dict.fromkeys(o.bits for o in options)]
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


def _sized(recipe: Recipe, source: Checkpoint, removed: int, bits: int | None) -> Option:
    unsized = Option(removed, bits, 0)
    planned = plan_run(settle(recipe, unsized), source, torch.device("cpu"))
    return replace(unsized, bytes=planned.sizes[-1].bytes)


def _tell(option: Option) -> str:
    told = f"{option.removed} layer{'s' * (option.removed != 1)} removed"
    if option.bits is not None:
        told += f", {option.bits} bits"
    return f"{told}, {human(option.bytes)}"
