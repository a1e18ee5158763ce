"""What a run would do, from the headers alone: sizes after each stage, memory and disk needed."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from mkaq.arch.config import keep_layers
from mkaq.checkpoint.reader import Checkpoint
from mkaq.errors import ResourceError, UsageError
from mkaq.merge.channels import check_solvable
from mkaq.merge.groups import layers_to_remove
from mkaq.quantize.check import check_gptq
from mkaq.recipe import BitsandbytesSection, GptqSection, Recipe
from mkaq.run.memory import peaks, spilled_bytes
from mkaq.run.publish import PLACES
from mkaq.units import human, parse_size
from mkaq.walk.activations import Place

_ROOM = 0.8  # of the host's memory that hidden states may take
_AVERAGE = "fuse: average, with recover: {method: layerwise}"
_LESS = {
    "merge": "merge.fuse: average, which needs less than channels",
    "recover": "lower recover.batch_size or calibration.max_seq_length, or leave recover out",
    "quantize": "quantize: {method: bitsandbytes}, which needs less than gptq",
    "evaluate": "lower evaluate.perplexity.max_seq_length or num_samples, or leave it out",
}


@dataclass(frozen=True)
class StageSize:
    """A model as it is after a stage; `bytes` counts the weights."""

    stage: str
    layers: int
    parameters: int
    bytes: int


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
    """

    sizes: tuple[StageSize, ...]
    memory: Mapping[str, int]
    disk_bytes: int
    place: Place = "device"
    host_bytes: int = 0

    @property
    def memory_bytes(self) -> int:
        """The expected peak of the run."""
        return max(self.memory.values())


def output_dtype(recipe: Recipe, source: Checkpoint) -> torch.dtype:
    """The type in which dense weights are written."""
    named: torch.dtype = source.dtype if recipe.model.dtype == "auto" else getattr(torch, recipe.model.dtype)
    return named


def plan_run(
    recipe: Recipe,
    source: Checkpoint,
    device: torch.device,
    limit: int | None = None,
    processes: int = 1,
) -> RunPlan:
    """Plans a run and checks everything that headers can tell.

    Args:
        recipe: What is to be done.
        source: The model.
        device: Where layers run.
        limit: Bytes of memory that the run may use; all that the device has if None.
        processes: That share the samples.

    Raises:
        UsageError: If there is nothing to do, or the layers asked for cannot be merged away.
        UnsupportedError: If the model cannot lose layers, or a linear layer does not fit the format.
    """
    if recipe.merge is None and recipe.quantize is None:
        raise UsageError("nothing to do: merge and quantize are both null", where="recipe")
    longest = source.sizes.positions
    length = recipe.calibration.max_seq_length
    if recipe.needs_calibration and length > longest:
        raise UsageError(
            f"{length} is longer than the model's {longest} positions", where="calibration.max_seq_length"
        )
    itemsize = output_dtype(recipe, source).itemsize
    outer = source.count_weights(source.outer_tensor_names)
    layer = source.count_weights(source.layer_tensor_names(0))
    layers = source.num_layers
    sizes = [StageSize("source", layers, outer + layers * layer, source.nbytes)]
    disk = 0
    if recipe.merge is not None:
        removed = layers_to_remove(recipe.merge, layers)
        keep_layers(
            source.config, source.hf_config.to_dict(), range(layers - removed), source.path / "config.json"
        )
        layers -= removed
        parameters = outer + layers * layer
        sizes.append(StageSize("merge", layers, parameters, parameters * itemsize))
        disk += parameters * itemsize
        if recipe.merge.fuse == "channels":
            check_solvable(source, recipe.calibration.num_samples, "merge.fuse: channels", _AVERAGE)
        if recipe.recover is not None:
            sizes.append(StageSize("recover", layers, parameters, parameters * itemsize))
            disk += parameters * itemsize
    if recipe.quantize is not None:
        if isinstance(recipe.quantize, GptqSection):
            check_gptq(source, recipe.quantize)
            if recipe.quantize.target == "source":
                check_solvable(
                    source, recipe.calibration.num_samples, "quantize.target: source", "target: input"
                )
        linears = _linear_shapes(source)
        dense = layer - sum(rows * columns for rows, columns in linears)
        stored = sum(_quantized_bytes(rows, columns, recipe.quantize) for rows, columns in linears)
        size = (outer + layers * dense) * itemsize + layers * stored
        sizes.append(StageSize("quantize", layers, outer + layers * layer, size))
        disk += size
    disk += sizes[-1].bytes + min(parse_size(recipe.export.shard_size), max(s.bytes for s in sizes[1:]))
    disk += 20_000_000 + recipe.calibration.num_samples * length * 4
    needs = peaks(recipe, source, device, processes)
    states = max(need.states for need in needs.values())
    place: Place = "device"
    if max(need.at("device") for need in needs.values()) > (limit or memory_of(device, processes)):
        roomy = device.type != "cpu" and states <= _ROOM * memory_of(torch.device("cpu"), processes)
        place = "host" if roomy else "files"
    if place == "files":
        disk += spilled_bytes(recipe, source)
    memory = {stage: need.at(place) for stage, need in needs.items()}
    return RunPlan(tuple(sizes), memory, disk, place, states if place == "host" else 0)


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
    there = sum(p.stat().st_size for name in PLACES for p in (folder / name).glob("*") if p.is_file())
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
        less = _LESS.get(stage, "use a larger machine")
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


def _linear_shapes(source: Checkpoint) -> list[tuple[int, int]]:
    names = (source.arch.in_layer(0, f"{name}.weight") for name in source.arch.linear_names)
    return [(shape[0], shape[1]) for shape in (source.tensors[name].shape for name in names)]


def _quantized_bytes(rows: int, columns: int, section: GptqSection | BitsandbytesSection) -> int:
    if isinstance(section, GptqSection):
        groups = 1 if section.group_size == -1 else columns // section.group_size
        return (rows * columns + groups * rows) * section.bits // 8 + 2 * groups * rows + 4 * columns
    if section.bits == 8:
        return rows * columns + 4 * rows + 1
    blocks = -(-rows * columns // 64)
    scales = blocks + 4 * -(-blocks // 256) + 1024 if section.double_quant else 4 * blocks
    return (rows * columns + 1) // 2 + scales + 64 + 150
