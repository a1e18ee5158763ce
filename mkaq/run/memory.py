"""What the stages of a run need in memory at their peaks, from the headers alone.

A stage holds one layer as it is stored, the next one, which is read ahead, and what it computes. The
constants were set beside measured peaks: benchmarks/memory.py prints both.
"""

from dataclasses import dataclass, replace

import torch

from mkaq.checkpoint.reader import Checkpoint
from mkaq.merge.channels import CANDIDATES
from mkaq.merge.choose import candidate_groups
from mkaq.merge.cost import LOGITS, probe_count
from mkaq.merge.groups import layers_to_remove
from mkaq.merge.segment import longest_group
from mkaq.recipe import GptqSection, LayerwiseSection, MergeSection, PerplexitySection, Recipe
from mkaq.walk.activations import Place
from mkaq.walk.batches import TOKENS_PER_BATCH
from mkaq.walk.device import compute_dtype

_INTERPRETER = {"cpu": 600_000_000, "cuda": 500_000_000}  # with torch and transformers


@dataclass(frozen=True)
class Need:
    """Bytes that a stage is expected to need at its peak.

    Attributes:
        device: Of the process, or on the GPU, without the hidden states of all samples.
        states: Of these, wherever they lie.
    """

    device: int
    states: int = 0

    def at(self, place: Place) -> int:
        """Bytes on the device, with hidden states at a place."""
        return self.device + (self.states if place == "device" else 0)


@dataclass(frozen=True)
class _Shape:
    """Sizes of a model; bytes of a number as it is stored, in a fast walk, and in an exact one."""

    layer: int  # weights of a decoder layer
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    stored: int
    fast: int
    exact: int

    def walked(self, item: int) -> int:
        """A layer as it is stored, the next one, and the one that computes, if it is another."""
        return self.layer * (2 * self.stored + (0 if item == self.stored else item))

    def batch(self, tokens: int, item: int) -> int:
        """What a batch of tokens leaves in a layer while it runs."""
        return tokens * item * (3 * self.intermediate + 6 * self.hidden)


def peaks(recipe: Recipe, source: Checkpoint, device: torch.device, processes: int = 1) -> dict[str, Need]:
    """What each stage is expected to need at its peak.

    Args:
        recipe: What is to be done.
        source: The model.
        device: Where layers run.
        processes: That share the samples; the need is that of one.
    """
    shape, calibration = _shape(source, device), recipe.calibration
    length = calibration.max_seq_length
    tokens = -(-calibration.num_samples // processes) * length
    found = {"export": Need(0)}
    if recipe.merge is not None:
        found["merge"] = _merging(
            recipe.merge, source, shape, tokens, length, -(-calibration.num_samples // processes)
        )
    if recipe.recover is not None:
        tuning = _tuning(recipe, recipe.recover, shape, processes, eager=device.type == "cpu")
        states = 2 * tokens * shape.hidden * shape.exact
        found["recover"] = Need(shape.walked(shape.exact) + tuning, states)
    if isinstance(recipe.quantize, GptqSection):
        joint = recipe.quantize.target == "source"
        found["quantize"] = _gptq(recipe.quantize, source, shape, tokens, length, joint)
    elif recipe.quantize is not None:
        outer = shape.vocabulary * shape.hidden * shape.stored
        found["quantize"] = Need(max(shape.layer * (2 * shape.stored + 4), outer))
    if recipe.evaluate and (section := recipe.evaluate.perplexity):
        found["evaluate"] = _perplexity(section, shape, processes)
    base = _INTERPRETER[device.type]
    return {stage: replace(need, device=need.device + base) for stage, need in found.items()}


def spilled_bytes(recipe: Recipe, source: Checkpoint) -> int:
    """Bytes of hidden states, those of all processes, at most, where they lie in files."""
    calibration, hidden = recipe.calibration, source.sizes.hidden
    streams = calibration.num_samples * calibration.max_seq_length
    streams *= 5 + source.sizes.intermediate // hidden
    section = recipe.evaluate.perplexity if recipe.evaluate else None
    measured = (section.num_samples or 1024) * section.max_seq_length if section else 0
    return 4 * hidden * max(streams, measured)


def _shape(source: Checkpoint, device: torch.device) -> _Shape:
    sizes = source.sizes
    return _Shape(
        layer=source.count_weights(source.layer_tensor_names(0)),
        hidden=sizes.hidden,
        intermediate=sizes.intermediate,
        vocabulary=sizes.vocabulary,
        heads=sizes.heads,
        stored=source.dtype.itemsize,
        fast=compute_dtype(source.dtype, device, fast=True).itemsize,
        exact=compute_dtype(source.dtype, device).itemsize,
    )


def _merging(
    section: MergeSection, source: Checkpoint, shape: _Shape, tokens: int, length: int, samples: int
) -> Need:
    points = 8 * 6 * section.manifold.points**2 if section.manifold else 0
    if section.fuse == "average":
        measured = 3 if section.order == "measured" or section.coefficient == "measured" else 1
        states = tokens * shape.hidden * shape.fast
        walked = measured * shape.walked(shape.fast)
        return Need(walked + shape.batch(_batch(tokens, length), shape.fast) + points, measured * states)
    stream = tokens * shape.hidden
    candidates = candidate_groups(section, source.num_layers, layers_to_remove(section, source.num_layers))
    probes = 2 * probe_count(samples, max(1, len(candidates))) * length * shape.hidden
    states = max(stream * (2 * shape.exact + 4), len(candidates) * probes * shape.exact)
    group = _longest(section, source)
    channels = group * shape.intermediate
    kept = channels if group == 1 else int(CANDIDATES * shape.intermediate)
    moments = 8 * (2 * kept**2 + 3 * kept * shape.hidden)  # the Gram matrix and its inverse
    modules = group * shape.layer * (shape.stored + 2 * shape.exact)
    features = _batch(tokens, length) * 4 * (2 * channels + 2 * kept)
    fusing = modules + features + moments + shape.batch(_batch(tokens, length), shape.exact)
    head = shape.vocabulary * shape.hidden * (shape.exact + shape.stored) + 4 * 4 * min(
        LOGITS, shape.vocabulary * probes // shape.hidden
    )
    return Need(_holes(shape.walked(shape.exact) + max(fusing, head)), states)


def _batch(tokens: int, length: int) -> int:
    """Tokens of a batch."""
    return min(tokens, max(TOKENS_PER_BATCH, length))


def _holes(size: int) -> int:
    """What a heap takes for `size` bytes in tensors of many sizes."""
    return int(1.2 * size)


def _longest(section: MergeSection, source: Checkpoint) -> int:
    free = source.num_layers - section.protect.first - section.protect.last
    return longest_group(free, layers_to_remove(section, source.num_layers))


def _tuning(recipe: Recipe, section: LayerwiseSection, shape: _Shape, processes: int, eager: bool) -> int:
    """Weights, gradients, optimizer, best and rounded weights in float32; activations for backward.

    Eager attention keeps its weights, and has as many gradients at once: 16 bytes for two tokens and a head.
    """
    length = recipe.calibration.max_seq_length
    batch = -(-min(section.batch_size, recipe.calibration.num_samples) // processes) * length
    batch = min(batch, max(length, TOKENS_PER_BATCH))
    kept = 12 * shape.intermediate + 40 * shape.hidden + (16 * length * shape.heads if eager else 0)
    return 4 * 8 * shape.layer + batch * kept


def _gptq(
    section: GptqSection, source: Checkpoint, shape: _Shape, tokens: int, length: int, joint: bool
) -> Need:
    """The Hessian and its factor; the stacked weight, what was rounded, its error and codes."""
    solving = hessian = 0
    for group in source.arch.inputs:
        sizes = [source.tensors[source.arch.in_layer(0, f"{linear.name}.weight")].shape for linear in group]
        rows, columns = sum(size[0] for size in sizes), sizes[0][1]
        hessian = max(hessian, 5 * columns**2)  # and in bfloat16 the upper half of what is taken off products
        copies = 3 if section.desc_act else 2
        panel = 6 * min(4096, columns) * columns
        solving = max(solving, 4 * copies * columns**2 + rows * columns * (4 + 4 + 1 + 2 + 4) + panel)
        if joint:
            hessian = max(hessian, 8 * 2 * columns**2)  # moments of two halves
            solving = max(solving, 8 * 4 * columns**2)
    item = shape.exact if joint else shape.fast
    streams = tokens * item * ((5 if joint else 3) * shape.hidden + shape.intermediate)
    walks = 2 if joint else 1
    weights = walks * shape.walked(item) + shape.layer * item  # what was read stays mapped beside the new
    return Need(weights + max(solving, shape.batch(_batch(tokens, length), item) + hessian), streams)


def _perplexity(section: PerplexitySection, shape: _Shape, processes: int) -> Need:
    sequences = -(-(section.num_samples or 1024) // processes)
    length, item = section.max_seq_length, shape.exact
    head = shape.vocabulary * shape.hidden * (item + shape.stored) + length * shape.vocabulary * 8
    compute = max(shape.walked(item) + shape.batch(_batch(sequences * length, length), item), head)
    return Need(compute, sequences * length * shape.hidden * item)
