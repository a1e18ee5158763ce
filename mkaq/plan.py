"""The plan of a run, from headers alone: sizes after each stage, memory and disk space."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from mkaq.budget import Option, most_trials, options_of, settle
from mkaq.checkpoint.output import Output
from mkaq.checkpoint.reader import Checkpoint
from mkaq.errors import ResourceError, UnsupportedError, UsageError
from mkaq.formats.runtimes import TARGETS, runtimes
from mkaq.pipeline import STAGES
from mkaq.progress import Progress
from mkaq.recipe import Recipe
from mkaq.run.estimate import ModelSize, Need, Task, Work
from mkaq.run.memory import INTERPRETER
from mkaq.run.rates import Rehearsal
from mkaq.stages import evaluate
from mkaq.stages.base import Stage
from mkaq.stages.export import check_formats
from mkaq.stages.quantize import BitsandbytesSection
from mkaq.units import human, parse_size
from mkaq.walk.activations import PLACES, Place

_CPU = torch.device("cpu")
_HOST_FRACTION = 0.8  # of the host's memory that hidden states may take
LONG = 3 * 3600.0  # seconds of a run that deserves advice
_INSTANT = 2e10  # operations of a run that is over before it could be rehearsed
_WIDEST = 2.0  # times the bytes of 2-bit codes that a GGUF file of them may have
_SMALL_FILES = 20_000_000  # bytes of tokenizers, records and reports


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run.

    Attributes:
        sizes: Size of the source and of the model after each stage.
        memory: Expected peak of each stage, in bytes, on the device that runs layers (on a CPU, of the
            process).
        disk_bytes: Disk space needed in the run's folder, scratch files included.
        place: Where the hidden states of all samples are stored: on the device if they fit, else in host
            memory, else in files.
        host_bytes: Bytes of hidden states in host memory.
        options: The options of a budget; all of the above has room for each of them.
        work: What each stage computes.
        length: Tokens per calibration sample.
    """

    sizes: tuple[ModelSize, ...]
    memory: Mapping[str, int]
    disk_bytes: int
    place: Place = "device"
    host_bytes: int = 0
    options: tuple[Option, ...] = ()
    work: Mapping[str, Work] = field(default_factory=dict)
    length: int = 0

    def seconds(self, source: Checkpoint, device: torch.device, folder: Path) -> dict[str, float]:
        """How long each stage is expected to take here; of a budget, in its longest trial.

        Args:
            source: The source model; one of its layers is run.
            device: Where layers run.
            folder: The run's folder, whose disk is written to for a moment.
        """
        weights = source.count_weights(source.layer_tensor_names(0))
        if sum(work.operations(weights) for work in self.work.values()) < _INSTANT:
            return dict.fromkeys(self.work, 0.0)
        rehearsal = Rehearsal(source, device, self.length, _existing(folder))
        return {stage: rehearsal.seconds(work) for stage, work in self.work.items()}

    @property
    def memory_bytes(self) -> int:
        """The expected peak of the run."""
        return max(self.memory.values())


def output_of(recipe: Recipe, source: Checkpoint, progress: Progress) -> Output:
    """How a recipe's checkpoints are written."""
    return Output(dtype_of(recipe, source), parse_size(recipe.export.shard_size), progress)


def dtype_of(recipe: Recipe, source: Checkpoint) -> torch.dtype:
    """Type of the dense weights that a recipe writes."""
    named = recipe.model.dtype
    return source.dtype if named == "auto" else getattr(torch, named)


def plan_recipe(
    recipe: Recipe, source: Checkpoint, device: torch.device, limit: int | None = None, processes: int = 1
) -> RunPlan:
    """Plans a run; with a budget, the plan has room for each of its options.

    Args:
        recipe: The recipe.
        source: The source model.
        device: Where layers run.
        limit: Memory limit in bytes; the device's memory if None.
        processes: Processes that share the samples.

    Raises:
        UsageError: If there is nothing to do, or a setting does not fit the model.
        UnsupportedError: If the model or the format is not supported.
    """
    if recipe.budget is None:
        return plan_run(recipe, source, device, limit, processes)
    options = options_of(
        recipe, source.num_layers, lambda settled: plan_run(settled, source, _CPU).sizes[-1].bytes
    )
    if not options:
        raise UsageError("no layer may be merged and nothing is quantized", where="budget")
    plans = [plan_run(settle(recipe, option), source, device, limit) for option in options]
    largest = max(plans, key=lambda plan: plan.sizes[-1].bytes)
    stages = dict.fromkeys(stage for plan in plans for stage in plan.memory)
    return replace(
        largest,
        memory={stage: max(plan.memory.get(stage, 0) for plan in plans) for stage in stages},
        disk_bytes=most_trials(recipe, options) * max(plan.disk_bytes for plan in plans),
        place=max((plan.place for plan in plans), key=PLACES.index),
        host_bytes=max(plan.host_bytes for plan in plans),
        options=tuple(options),
        work={stage: Work.largest(plan.work.get(stage, Work()) for plan in plans) for stage in stages},
    )


def plan_run(
    recipe: Recipe, source: Checkpoint, device: torch.device, limit: int | None = None, processes: int = 1
) -> RunPlan:
    """Plans a run without a budget; arguments and errors as for `plan_recipe`."""
    if recipe.merge is None and recipe.quantize is None:
        raise UsageError("nothing to do: merge and quantize are both null", where="recipe")
    recipe = recipe.fitted(source.arch)
    calibration, dtype = recipe.calibration, dtype_of(recipe, source)
    samples, length = calibration.num_samples, calibration.max_seq_length
    task = Task(source, device, dtype, samples, length, processes)
    sizes = [ModelSize("source", source.num_layers, source.parameters, source.nbytes)]
    needs: dict[str, Need] = {}
    works, apart = dict[str, Work](), dict[str, Work]()
    published = disk = 0
    for stage in (*STAGES, evaluate):
        section = stage.section(recipe, source)
        if section is not None:
            need, after, work, kept, files, apart[stage.NAME] = stage.estimate(section, sizes[-1], task)
            written = files + (after.bytes if after else 0)
            needs[stage.NAME] = need
            works[stage.NAME] = work + Work(written=written)
            sizes += [after] if after else []
            published += written
            disk = max(disk, published + kept)
    if (measured := evaluate.section(recipe, source)) is not None:  # of every model
        for size in sizes[:-1]:
            works[evaluate.NAME] += evaluate.estimate(measured, size, task).work
    config = recipe.quantize.config(dtype) if recipe.quantize else None
    check_formats(recipe.export, source, config)
    _check_targets(recipe, config)
    base = INTERPRETER[device.type]
    needs = {stage: replace(need, device=need.device + base) for stage, need in needs.items()}
    states, allowed = max(need.states for need in needs.values()), limit or memory_of(device, processes)
    place: Place = "device"
    if max(need.at("device") for need in needs.values()) > allowed:
        fits_host = device.type != "cpu" and states <= _HOST_FRACTION * memory_of(_CPU, processes)
        place = "host" if fits_host else "files"
        works = {stage: work + apart[stage] for stage, work in works.items()}
    shard = min(parse_size(recipe.export.shard_size), max(size.bytes for size in sizes[1:]))
    copies = 1 + len(recipe.export.others) * (_WIDEST if config and config.get("bits") in (2, 3) else 1.2)
    disk = max(disk, published + int(copies * sizes[-1].bytes))
    disk += shard + _SMALL_FILES + samples * length * 4
    if place == "files":
        disk += processes * states
    memory = {stage: need.at(place) for stage, need in needs.items()}
    return RunPlan(tuple(sizes), memory, disk, place, states if place == "host" else 0, (), works, length)


def _check_targets(recipe: Recipe, config: Mapping[str, Any] | None) -> None:
    answers = {row.runtime: row.reason for row in runtimes(config, formats=recipe.export.others)}
    for target in recipe.targets:
        if reason := answers[TARGETS[target]]:
            fix = f"leave {target} out of targets, or change quantize or export.formats"
            what = f"{target} would not run this artifact: {reason}"
            raise UnsupportedError(what, where="targets", fix=fix)


def quantizations(recipe: Recipe, source: Checkpoint, plan: RunPlan) -> list[dict[str, Any] | None]:
    """The quantization_config of each model that a run may make; None if it is not quantized."""
    dtype = dtype_of(recipe, source)
    settled = [settle(recipe, option) for option in plan.options] or [recipe]
    return [each.quantize.config(dtype) if each.quantize else None for each in settled]


def remarks(recipe: Recipe, processes: int) -> Iterator[str]:
    """Yields the notes for a user who runs several processes.

    Raises:
        UsageError: If the recipe cannot run in several processes.
    """
    if processes == 1:
        return
    if recipe.budget is not None:
        raise UsageError("a budget is searched by one process", where="budget", fix="run it without torchrun")
    samples = recipe.calibration.num_samples
    if recipe.needs_calibration and samples < processes:
        yield f"{samples} samples for {processes} processes: {processes - samples} of them have nothing to do"
    if isinstance(recipe.quantize, BitsandbytesSection):
        yield "bitsandbytes quantizes in the first process alone"


def check_resources(
    plan: RunPlan, folder: Path, device: torch.device, limit: int | None = None, processes: int = 1
) -> None:
    """Refuses a run that cannot finish; each process on this machine gets an equal part of the memory.

    Raises:
        ResourceError: If the disk or the memory is too small.
    """
    names = [*(stage.NAME for stage in STAGES), "artifact"]
    present = sum(p.stat().st_size for name in names for p in (folder / name).glob("*") if p.is_file())
    free = shutil.disk_usage(_existing(folder)).free
    if plan.disk_bytes - present > free:
        raise ResourceError(
            f"the run needs {human(plan.disk_bytes - present)} of disk, {human(free)} are free",
            where=folder,
            fix="choose another folder with --output",
        )
    allowed = limit or memory_of(device, processes)
    if plan.memory_bytes > allowed:
        stage = max(plan.memory, key=lambda name: plan.memory[name])
        available = f"--max-memory allows {human(allowed)}" if limit else f"{device} has {human(allowed)}"
        advice = _stage_named(stage).LESS
        raise_limit = f"--max-memory {-(-plan.memory_bytes // 10**7) / 100:.2f}GB would do; or "
        raise ResourceError(
            f"the run is expected to need {human(plan.memory_bytes)} of memory ({stage}), {available}",
            fix=(raise_limit if plan.memory_bytes < memory_of(device) else "") + advice,
        )


def _existing(folder: Path) -> Path:
    """The folder, or the first of those above it that exists."""
    return next(p for p in (folder, *folder.absolute().parents) if p.exists())


def _stage_named(name: str) -> Stage:
    return next(stage for stage in (*STAGES, evaluate) if name == stage.NAME)


def too_long(seconds: Mapping[str, float], device: torch.device) -> Iterator[str]:
    """Yields advice if a run will take longer than `LONG`."""
    total, longest = sum(seconds.values()), max(seconds, key=lambda stage: seconds[stage], default="")
    if total < LONG:
        return
    gpu = "run it on a GPU; or " if device.type == "cpu" else ""
    advice = gpu + _stage_named(longest).SOONER
    yield f"that is long, and {longest} takes {seconds[longest] / total:.0%} of it: {advice}"


def refusal(
    plan: RunPlan, folder: Path, device: torch.device, limit: int | None = None, processes: int = 1
) -> ResourceError | None:
    """The error with which `check_resources` would refuse a run; None if it would not."""
    try:
        check_resources(plan, folder, device, limit, processes)
    except ResourceError as error:
        return error
    return None


def memory_of(device: torch.device, processes: int = 1) -> int:
    """Bytes of memory per process: an equal part of the host's, or a whole GPU's."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().total) // processes
    return int(torch.cuda.get_device_properties(device).total_memory)
