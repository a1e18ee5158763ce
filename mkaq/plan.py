"""What a run would do, from the headers alone: sizes after each stage, memory and disk needed."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from mkaq.budget import Option, most_trials, options_of, settle
from mkaq.checkpoint.output import Output
from mkaq.checkpoint.reader import Checkpoint
from mkaq.errors import ResourceError, UsageError
from mkaq.pipeline import STAGES
from mkaq.progress import Progress
from mkaq.recipe import Recipe
from mkaq.run.estimate import ModelSize, Need, Task
from mkaq.run.memory import INTERPRETER
from mkaq.stages import evaluate
from mkaq.stages.quantize import BitsandbytesSection
from mkaq.units import human, parse_size
from mkaq.walk.activations import Place

_CPU = torch.device("cpu")
_ROOM = 0.8  # of the host's memory that hidden states may take
_BESIDE = 20_000_000  # bytes of tokenizers, records and reports


@dataclass(frozen=True)
class RunPlan:
    """What a run would do.

    Attributes:
        sizes: The model as it comes and after each stage.
        memory: Expected peak of each stage, in bytes, on the device where layers run (on a CPU, of the
            process).
        disk_bytes: Needed in the run's folder, scratch included.
        place: Where the hidden states of all samples lie: on the device if it has room, else in its
            host's memory, else in files.
        host_bytes: Of hidden states in the host's memory.
        options: What a budget may choose among, for which all of the above has room.
    """

    sizes: tuple[ModelSize, ...]
    memory: Mapping[str, int]
    disk_bytes: int
    place: Place = "device"
    host_bytes: int = 0
    options: tuple[Option, ...] = ()

    @property
    def memory_bytes(self) -> int:
        """The expected peak of the run."""
        return max(self.memory.values())


def output_of(recipe: Recipe, source: Checkpoint, progress: Progress) -> Output:
    """How the recipe has checkpoints written."""
    named = recipe.model.dtype
    dtype: torch.dtype = source.dtype if named == "auto" else getattr(torch, named)
    return Output(dtype, parse_size(recipe.export.shard_size), progress)


def plan_recipe(
    recipe: Recipe, source: Checkpoint, device: torch.device, limit: int | None = None, processes: int = 1
) -> RunPlan:
    """Plans a run; one with a budget has room for each of its options.

    Args:
        recipe: What is to be done.
        source: The model.
        device: Where layers run.
        limit: Bytes of memory that the run may use; all that the device has if None.
        processes: That share the samples.

    Raises:
        UsageError: If there is nothing to do, or a setting does not fit the model.
        UnsupportedError: If the model or the format does not allow it.
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
        place=max((plan.place for plan in plans), key=("device", "host", "files").index),
        host_bytes=max(plan.host_bytes for plan in plans),
        options=tuple(options),
    )


def plan_run(
    recipe: Recipe, source: Checkpoint, device: torch.device, limit: int | None = None, processes: int = 1
) -> RunPlan:
    """Plans a run without a budget; arguments and errors as for `plan_recipe`."""
    if recipe.merge is None and recipe.quantize is None:
        raise UsageError("nothing to do: merge and quantize are both null", where="recipe")
    calibration, dtype = recipe.calibration, output_of(recipe, source, Progress(quiet=True)).dtype
    samples, length = calibration.num_samples, calibration.max_seq_length
    task = Task(source, device, dtype, samples, length, processes)
    sizes = [ModelSize("source", source.num_layers, source.parameters, source.nbytes)]
    needs: dict[str, Need] = {}
    for stage in (*STAGES, evaluate):
        section = stage.section(recipe, source)
        if section is not None:
            need, after = stage.estimate(section, sizes[-1], task)
            needs[stage.NAME] = need
            sizes += [after] if after else []
    base = INTERPRETER[device.type]
    needs = {stage: replace(need, device=need.device + base) for stage, need in needs.items()}
    states, allowed = max(need.states for need in needs.values()), limit or memory_of(device, processes)
    place: Place = "device"
    if max(need.at("device") for need in needs.values()) > allowed:
        roomy = device.type != "cpu" and states <= _ROOM * memory_of(_CPU, processes)
        place = "host" if roomy else "files"
    made = [size.bytes for size in sizes[1:]]
    shard = min(parse_size(recipe.export.shard_size), max(made))
    disk = sum(made) + made[-1] + shard + _BESIDE + samples * length * 4
    if place == "files":
        disk += processes * states
    memory = {stage: need.at(place) for stage, need in needs.items()}
    return RunPlan(tuple(sizes), memory, disk, place, states if place == "host" else 0)


def quantizations(recipe: Recipe, source: Checkpoint, plan: RunPlan) -> list[dict[str, Any] | None]:
    """The quantization_config of what a run may make; None: it is not quantized."""
    dtype = output_of(recipe, source, Progress(quiet=True)).dtype
    settled = [settle(recipe, option) for option in plan.options] or [recipe]
    return [one.quantize.config(dtype) if one.quantize else None for one in settled]


def remarks(recipe: Recipe, processes: int) -> Iterator[str]:
    """What a user should know of a run of several processes before it starts, in lines.

    Raises:
        UsageError: If there is something that several cannot do.
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
    """Refuses a run that cannot end well; of several processes on this machine each needs its part.

    Raises:
        ResourceError: If the disk or the memory is too small.
    """
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    names = [*(stage.NAME for stage in STAGES), "artifact"]
    there = sum(p.stat().st_size for name in names for p in (folder / name).glob("*") if p.is_file())
    free = shutil.disk_usage(place).free
    if plan.disk_bytes - there > free:
        raise ResourceError(
            f"the run needs {human(plan.disk_bytes - there)} of disk, {human(free)} are free",
            where=folder,
            fix="choose another folder with --output",
        )
    allowed = limit or memory_of(device, processes)
    if plan.memory_bytes > allowed:
        stage = max(plan.memory, key=lambda name: plan.memory[name])
        has = f"--max-memory allows {human(allowed)}" if limit else f"{device} has {human(allowed)}"
        less = next(each.LESS for each in (*STAGES, evaluate) if stage == each.NAME)
        enough = f"--max-memory {-(-plan.memory_bytes // 10**7) / 100:.2f}GB would do; or "
        raise ResourceError(
            f"the run is expected to need {human(plan.memory_bytes)} of memory ({stage}), {has}",
            fix=(enough if plan.memory_bytes < memory_of(device) else "") + less,
        )


def memory_of(device: torch.device, processes: int = 1) -> int:
    """Bytes of memory that a device has for each of the processes of this machine: a GPU is one's alone."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().total) // processes
    return int(torch.cuda.get_device_properties(device).total_memory)
