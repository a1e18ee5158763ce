"""What the stages of a run need in memory at their peaks, from the headers alone.

A stage holds one layer as it is stored, the next one, which is read ahead, and what it computes. The
constants were set beside measured peaks: benchmarks/memory.py prints both.
"""

from dataclasses import dataclass

import torch

from mkaq.merge.plan import layers_to_remove
from mkaq.merge.segment import longest_group
from mkaq.model.checkpoint import Checkpoint
from mkaq.model.products import has_fast_bfloat16
from mkaq.model.walk import TOKENS_PER_BATCH
from mkaq.recipe import GptqSection, LayerwiseSection, MergeSection, PerplexitySection, Recipe

_INTERPRETER = {"cpu": 600_000_000, "cuda": 500_000_000}  # with torch and transformers
_BLOCK = 64 << 20


@dataclass(frozen=True)
class _Shape:
    """Sizes of a model, and bytes of a number in a walk over it."""

    layer: int  # weights of a decoder layer
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    stored: int
    computed: int
    fast: bool

    def walked(self, fast: bool) -> int:
        """A layer as it is stored, the next one, and the one that computes, if it is another."""
        shared = self.stored == self.computed or (fast and self.fast and self.stored == 2)
        return self.layer * (2 * self.stored + (0 if shared else self.computed))

    def batch(self, length: int, fast: bool) -> int:
        """What a batch of tokens leaves in a layer while it runs."""
        tokens = max(TOKENS_PER_BATCH, length)
        item = 2 if fast and self.fast else self.computed
        return tokens * (3 * item * self.intermediate + 6 * self.computed * self.hidden)


def peaks(recipe: Recipe, source: Checkpoint, device: torch.device, *, spill: bool = False) -> dict[str, int]:
    """Bytes that each stage is expected to need at its peak: of the process, or of the GPU.

    Args:
        recipe: What is to be done.
        source: The model.
        device: Where layers run.
        spill: Whether the hidden states of all samples lie in files.
    """
    shape, calibration = _shape(source, device), recipe.calibration
    length = calibration.max_seq_length
    states = 0 if spill else calibration.num_samples * length * shape.hidden * shape.computed
    found = {"export": _BLOCK}
    if recipe.merge is not None:
        found["merge"] = _merging(recipe.merge, source, shape, states, length)
    if recipe.recover is not None:
        found["recover"] = 2 * states + shape.walked(False) + _tuning(recipe, recipe.recover, shape)
    if isinstance(recipe.quantize, GptqSection):
        joint = recipe.quantize.target == "source"
        found["quantize"] = _gptq(recipe.quantize, source, shape, states, length, joint)
    elif recipe.quantize is not None:
        found["quantize"] = max(
            shape.layer * (2 * shape.stored + 4), shape.vocabulary * shape.hidden * shape.stored
        )
    if recipe.evaluate and (section := recipe.evaluate.perplexity):
        found["evaluate"] = _perplexity(section, shape, spill)
    return {stage: need + _INTERPRETER[device.type] for stage, need in found.items()}


def spilled_bytes(recipe: Recipe, source: Checkpoint) -> int:
    """Bytes of the files in which hidden states lie, at most, when they are spilled (on a CPU)."""
    calibration, hidden = recipe.calibration, int(source.hf_config.hidden_size)
    streams = 4 * calibration.num_samples * calibration.max_seq_length
    section = recipe.evaluate.perplexity if recipe.evaluate else None
    measured = (section.num_samples or 1024) * section.max_seq_length if section else 0
    return 4 * hidden * max(streams, measured)


def _shape(source: Checkpoint, device: torch.device) -> _Shape:
    config = source.hf_config
    names = source.layer_tensor_names(0)
    return _Shape(
        layer=sum(torch.Size(source.tensors[name].shape).numel() for name in names),
        hidden=int(config.hidden_size),
        intermediate=int(config.intermediate_size),
        vocabulary=int(config.vocab_size),
        heads=int(config.num_attention_heads),
        stored=source.dtype.itemsize,
        computed=4 if device.type == "cpu" else source.dtype.itemsize,
        fast=device.type == "cpu" and has_fast_bfloat16(device),
    )


def _merging(section: MergeSection, source: Checkpoint, shape: _Shape, states: int, length: int) -> int:
    points = 8 * 6 * section.manifold.points**2
    if section.fuse == "average":
        measured = 3 if section.order == "measured" or section.coefficient == "measured" else 1
        walk = measured * (states + shape.walked(True)) + shape.batch(length, True)
        return max(walk + points, 3 * _BLOCK)
    group = _longest(section, source)
    channels = group * shape.intermediate
    moments = 8 * (4 * channels**2 + 2 * channels * shape.hidden)
    modules = group * shape.layer * (shape.stored + 2 * shape.computed)
    features = max(TOKENS_PER_BATCH, length) * channels * 12
    return 4 * states + shape.walked(False) + modules + features + moments


def _longest(section: MergeSection, source: Checkpoint) -> int:
    free = source.num_layers - section.protect.first - section.protect.last
    return longest_group(free, layers_to_remove(section, source.num_layers))


def _tuning(recipe: Recipe, section: LayerwiseSection, shape: _Shape) -> int:
    """Weights, gradients, optimizer and best weights in float32; activations for backward."""
    length = recipe.calibration.max_seq_length
    batch = min(section.batch_size, recipe.calibration.num_samples) * length
    kept = 12 * shape.intermediate + 40 * shape.hidden + 6 * length * shape.heads
    return 4 * 6 * shape.layer + batch * kept


def _gptq(
    section: GptqSection, source: Checkpoint, shape: _Shape, states: int, length: int, joint: bool
) -> int:
    """The Hessian and its factor; the stacked weight, what was rounded, its error and codes."""
    solving = 0
    for group in source.family.linears:
        sizes = [source.tensors[f"model.layers.0.{name}.weight"].shape for name in group]
        rows, columns = sum(size[0] for size in sizes), sizes[0][1]
        copies = 3 if section.desc_act else 2
        solving = max(solving, 4 * copies * columns**2 + rows * columns * (4 + 4 + 1 + 2 + 1))
        if joint:
            solving = max(solving, 8 * 4 * columns**2)
    batch = shape.batch(length, not joint)
    kept = states // shape.computed * (2 if shape.fast else shape.computed)
    streams = states + kept + (2 * states if joint else 0)
    return streams + shape.walked(not joint) + max(solving, batch + solving // 3)


def _perplexity(section: PerplexitySection, shape: _Shape, spill: bool) -> int:
    sequences = section.num_samples or 1024
    states = 0 if spill else sequences * section.max_seq_length * shape.hidden * shape.computed
    head = shape.vocabulary * shape.hidden * (shape.computed + shape.stored)
    head += section.max_seq_length * shape.vocabulary * 12
    return states + max(shape.walked(False) + shape.batch(section.max_seq_length, False), head)
