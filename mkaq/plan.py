"""What a run would do, from the headers alone: sizes after each stage, memory and disk needed."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from mkaq.errors import ResourceError, UsageError
from mkaq.handoff import PLACES
from mkaq.merge.fuse import check_fusable
from mkaq.merge.plan import layers_to_remove
from mkaq.merge.segment import longest_group
from mkaq.model.architecture import keep_layers
from mkaq.model.checkpoint import Checkpoint
from mkaq.quantize.gptq_stage import check_gptq
from mkaq.recipe import BitsandbytesSection, GptqSection, LayerwiseSection, MergeSection, Recipe
from mkaq.units import human, parse_size

_BASE_MEMORY = 700_000_000  # the interpreter with torch and transformers
_BATCH_TOKENS = 4096


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
        memory_bytes: Expected peak on the device where layers run (on a CPU, of the process).
        disk_bytes: Needed in the run's folder, scratch included.
    """

    sizes: tuple[StageSize, ...]
    memory_bytes: int
    disk_bytes: int


def output_dtype(recipe: Recipe, source: Checkpoint) -> torch.dtype:
    """The type in which dense weights are written."""
    named: torch.dtype = source.dtype if recipe.model.dtype == "auto" else getattr(torch, recipe.model.dtype)
    return named


def plan_run(recipe: Recipe, source: Checkpoint, device: torch.device) -> RunPlan:
    """Plans a run and checks everything that headers can tell.

    Raises:
        UsageError: If there is nothing to do, or the layers asked for cannot be merged away.
        UnsupportedError: If the model cannot lose layers, or a linear layer does not fit the format.
    """
    if recipe.merge is None and recipe.quantize is None:
        raise UsageError("nothing to do: merge and quantize are both null", where="recipe")
    longest = source.hf_config.max_position_embeddings
    length = recipe.calibration.max_seq_length
    if recipe.needs_calibration and length > longest:
        raise UsageError(
            f"{length} is longer than the model's {longest} positions", where="calibration.max_seq_length"
        )
    itemsize = output_dtype(recipe, source).itemsize
    outer = _parameters(source, source.outer_tensor_names)
    layer = _parameters(source, source.layer_tensor_names(0))
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
            check_fusable(source, recipe.calibration.num_samples)
        if recipe.recover is not None:
            sizes.append(StageSize("recover", layers, parameters, parameters * itemsize))
            disk += parameters * itemsize
    if recipe.quantize is not None:
        if isinstance(recipe.quantize, GptqSection):
            check_gptq(source, recipe.quantize)
        linears = _linear_shapes(source)
        dense = layer - sum(rows * columns for rows, columns in linears)
        stored = sum(_quantized_bytes(rows, columns, recipe.quantize) for rows, columns in linears)
        size = (outer + layers * dense) * itemsize + layers * stored
        sizes.append(StageSize("quantize", layers, outer + layers * layer, size))
        disk += size
    disk += sizes[-1].bytes + min(parse_size(recipe.export.shard_size), max(s.bytes for s in sizes[1:]))
    disk += 20_000_000 + recipe.calibration.num_samples * length * 4
    return RunPlan(tuple(sizes), _memory(recipe, source, layer, device), disk)


def check_resources(plan: RunPlan, folder: Path, device: torch.device) -> None:
    """Refuses a run that cannot end well.

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
    memory = (
        psutil.virtual_memory().total
        if device.type == "cpu"
        else torch.cuda.get_device_properties(device).total_memory
    )
    if plan.memory_bytes > memory:
        raise ResourceError(
            f"the run is expected to need {human(plan.memory_bytes)} of memory, {device} has {human(memory)}",
            fix="lower num_samples or max_seq_length of calibration and evaluate.perplexity, or "
            "recover.batch_size; merge.fuse: average needs less than channels",
        )


def _parameters(source: Checkpoint, names: list[str]) -> int:
    return sum(torch.Size(source.tensors[name].shape).numel() for name in names)


def _linear_shapes(source: Checkpoint) -> list[tuple[int, int]]:
    shapes = (source.tensors[f"model.layers.0.{name}.weight"].shape for name in source.family.linear_names)
    return [(shape[0], shape[1]) for shape in shapes]


def _quantized_bytes(rows: int, columns: int, section: GptqSection | BitsandbytesSection) -> int:
    if isinstance(section, GptqSection):
        groups = 1 if section.group_size == -1 else columns // section.group_size
        return (rows * columns + groups * rows) * section.bits // 8 + 2 * groups * rows + 4 * columns
    if section.bits == 8:
        return rows * columns + 4 * rows + 1
    blocks = -(-rows * columns // 64)
    scales = blocks + 4 * -(-blocks // 256) + 1024 if section.double_quant else 4 * blocks
    return (rows * columns + 1) // 2 + scales + 64 + 150


def _fusing(section: MergeSection, source: Checkpoint) -> int:
    """Bytes that fusing a group of layers takes: their tensors, and float64 moments of their channels."""
    free = source.num_layers - section.protect.first - section.protect.last
    group = longest_group(free, layers_to_remove(section, source.num_layers))
    channels = group * int(source.hf_config.intermediate_size)
    return 8 * 4 * channels**2 + 12 * group * _parameters(source, source.layer_tensor_names(0))


def _tuning(recipe: Recipe, section: LayerwiseSection, source: Checkpoint, layer: int) -> int:
    """Bytes that tuning a layer takes: float32 weights, gradients, optimizer; activations for backward."""
    config, length = source.hf_config, recipe.calibration.max_seq_length
    batch = min(section.batch_size, recipe.calibration.num_samples) * length
    attention = batch * length * int(config.num_attention_heads) * 6
    kept = 12 * int(config.intermediate_size) + 40 * int(config.hidden_size)
    return 4 * 6 * layer + batch * kept + attention


def _memory(recipe: Recipe, source: Checkpoint, layer: int, device: torch.device) -> int:
    config = source.hf_config
    item = 4 if device.type == "cpu" else source.dtype.itemsize
    hidden, vocabulary = config.hidden_size, config.vocab_size
    heads = config.num_attention_heads
    longest = max(recipe.calibration.max_seq_length, 1)
    batch = max(_BATCH_TOKENS, longest)
    working = layer * (item + source.dtype.itemsize) + batch * item * (
        4 * config.intermediate_size + 8 * hidden
    )
    working += batch * longest * heads * item * 2 if config.model_type == "gemma2" else 0
    peaks = [0]
    if recipe.needs_calibration:
        activations = recipe.calibration.num_samples * recipe.calibration.max_seq_length * hidden * item
        solver = 0
        if isinstance(recipe.quantize, GptqSection):
            for group in source.family.linears:
                shapes = [source.tensors[f"model.layers.0.{name}.weight"].shape for name in group]
                rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
                solver = max(solver, 4 * (6 * columns * columns + 8 * rows * columns))
        streams = 1
        if recipe.merge is not None and recipe.merge.fuse == "channels":
            solver, streams = max(solver, _fusing(recipe.merge, source)), 4
        if recipe.recover is not None:
            streams = max(streams, 2)
            solver = max(solver, _tuning(recipe, recipe.recover, source, layer))
        peaks.append(streams * activations + working + solver)
    if recipe.evaluate and (section := recipe.evaluate.perplexity):
        sequences = section.num_samples or 1024
        states = sequences * section.max_seq_length * hidden * item
        head = vocabulary * hidden * item + section.max_seq_length * vocabulary * 12
        peaks.append(states + max(working, head))
    return (_BASE_MEMORY if device.type == "cpu" else 500_000_000) + max(peaks)
