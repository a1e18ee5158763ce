"""Peak memory of each stage, estimated from headers alone.

A stage holds one layer as stored, the next one (read ahead), and its computation. The constants were fitted
to measured peaks: benchmarks/memory.py prints both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mkaq.arch.config import Sizes
from mkaq.distill.loss import LOGITS as DISTILLED_LOGITS
from mkaq.distill.own_words import BATCH
from mkaq.distill.teacher import FILE, bytes_per_token
from mkaq.formats.packing import ROWS
from mkaq.merge.cost import LOGITS
from mkaq.merge.solve import CANDIDATES
from mkaq.recover.ending import LOGITS as TUNED_LOGITS
from mkaq.recover.ending import STEP as ENDING_TOKENS
from mkaq.run.estimate import Need, Task
from mkaq.run.work import trial_tokens
from mkaq.walk.batches import TOKENS_PER_BATCH
from mkaq.walk.device import compute_dtype

INTERPRETER = {"cpu": 600_000_000, "cuda": 500_000_000}  # with torch and transformers


@dataclass(frozen=True)
class _Shape:
    """Sizes of a model; `stored`, `fast`, `exact`: bytes per number on disk, in a fast and an exact walk."""

    layer: int  # weights of a decoder layer
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    stored: int
    fast: int
    exact: int

    @classmethod
    def of(cls, task: Task) -> "_Shape":
        source, sizes = task.source, task.source.sizes
        return cls(
            layer=source.count_weights(source.layer_tensor_names(0)),
            hidden=sizes.hidden,
            intermediate=sizes.intermediate,
            vocabulary=sizes.vocabulary,
            heads=sizes.heads,
            stored=source.dtype.itemsize,
            fast=compute_dtype(source.dtype, task.device, fast=True).itemsize,
            exact=compute_dtype(source.dtype, task.device).itemsize,
        )

    def walked(self, item: int) -> int:
        """Bytes of a layer as stored, of the next one, and of the converted one if its dtype differs."""
        return self.layer * (2 * self.stored + (0 if item == self.stored else item))

    def batch(self, tokens: int, item: int) -> int:
        """Bytes of a layer's intermediate results for a batch of tokens."""
        return tokens * item * (3 * self.intermediate + 6 * self.hidden)


def analyzing(task: Task, points: int, fuse: str, candidates: Sequence[tuple[int, int]]) -> Need:
    """Comparing layers at `points` positions, and measuring the costs of candidate groups."""
    shape, tokens = _Shape.of(task), task.own * task.length
    pairs = 8 * 6 * points**2
    if fuse == "average":
        walks = 3 if candidates else 1
        walking = walks * shape.walked(shape.fast) + shape.batch(_batch(tokens, task.length), shape.fast)
        return Need(walking + pairs, walks * tokens * shape.hidden * shape.fast)
    if not candidates:
        walking = shape.walked(shape.exact) + shape.batch(_batch(tokens, task.length), shape.exact)
        return Need(walking + pairs, tokens * shape.hidden * shape.exact)
    stream, probes = (each * shape.hidden for each in trial_tokens(task, len(candidates)))
    states = stream * (3 * shape.exact + 4) + (len(candidates) + 1) * probes * shape.exact
    head = shape.vocabulary * shape.hidden * (shape.exact + shape.stored) + 4 * 4 * min(
        LOGITS, shape.vocabulary * probes // shape.hidden
    )
    group = max(length for _, length in candidates)
    fusing = _fusing(shape, group, tokens, task.length)
    return Need(_holes(shape.walked(shape.exact) + max(fusing, head)), states)


def merging(task: Task, fuse: str, longest: int, measured: bool) -> Need:
    """Averaging, perhaps with measured coefficients, or fusing groups of at most `longest` layers."""
    shape, tokens = _Shape.of(task), task.own * task.length
    if fuse == "average":
        walks = 3 if measured else 1
        walking = walks * shape.walked(shape.fast) + shape.batch(_batch(tokens, task.length), shape.fast)
        return Need(walking, walks * tokens * shape.hidden * shape.fast if measured else 0)
    walking = shape.walked(shape.exact) + _fusing(shape, longest, tokens, task.length)
    return Need(_holes(walking), tokens * shape.hidden * (2 * shape.exact + 4))


def _fusing(shape: _Shape, group: int, tokens: int, length: int) -> int:
    """Bytes of a group's layers as modules, of their channels' outputs for a batch, and of the moments."""
    kept = shape.intermediate if group == 1 else int(CANDIDATES * shape.intermediate)
    readers = 2 * shape.hidden * shape.intermediate * shape.stored  # of a layer's channels
    modules = (group + 1) * shape.layer * shape.stored + group * readers
    batch = _batch(tokens, length)
    summing = 4 * (kept**2 + kept * shape.hidden) + 4 * batch * 3 * kept + shape.batch(batch, shape.exact)
    summing += 2 * shape.hidden * kept * shape.exact  # the readers of the candidates
    choosing = 4 * (2.3 * kept**2 + 2 * kept * shape.hidden)  # the Gram matrix, its inverse, and stripes
    return modules + max(summing, int(choosing))


def tuning(task: Task, batch_size: int) -> Need:
    """Weights, gradients, optimizer, best and rounded weights in float32; activations for backward. At the
    end the head and the logits of both models, too.

    Eager attention keeps its weights and their gradients: 32 bytes per head and pair of tokens.
    """
    shape, length, eager = _Shape.of(task), task.length, task.device.type == "cpu"
    batch = -(-min(batch_size, task.samples) // task.processes) * length
    batch = min(batch, max(length, TOKENS_PER_BATCH))
    kept = 24 * shape.intermediate + 80 * shape.hidden + (32 * length * shape.heads if eager else 0)
    states = 2 * task.own * length * shape.hidden * shape.exact
    logits = min(TUNED_LOGITS, shape.vocabulary * batch)
    head = shape.vocabulary * shape.hidden * (shape.fast + shape.stored) + 5 * 4 * logits
    weights = shape.walked(shape.exact) + 4 * 8 * shape.layer
    end = head + min(batch, max(length, ENDING_TOKENS)) * kept
    return Need(weights + max(batch * kept, end), states)


def teaching(task: Task, samples: int, length: int, top_k: int, *, whole: bool) -> Need:
    """Perplexity's walk, and the predictions of one file; before it perhaps the source, whole."""
    walking, source = measuring(task, samples, length), task.source
    device = walking.device + min(samples * length * bytes_per_token(top_k), 2 * FILE)
    sizes, exact = source.sizes, compute_dtype(source.dtype, task.device).itemsize
    cached = 2 * BATCH * length * sizes.kv_heads * sizes.head_dim * source.num_layers
    return replace(walking, device=max(device, whole * (source.parameters + cached) * exact))


def distilling(task: Task, layers: int, batch_size: int, length: int, held_out: int, trained: float) -> Need:
    """Of one layer float32 weights, gradients and activations for backward, and the head. Beside hidden
    states: the trained weights of all layers, two moments of each, and the best so far.

    Where all of it fits on the device, all layers are there at once, with their activations of a batch.

    Args:
        task: The task.
        layers: Layers of the model.
        batch_size: Sequences of a step.
        length: Tokens per sequence.
        held_out: Held-out tokens of all processes.
        trained: Trained weights of a layer.
    """
    shape, eager = _Shape.of(task), task.device.type == "cpu"
    own = -(-batch_size // task.processes) * length
    batch = _batch(own, length)
    kept = 24 * shape.intermediate + 80 * shape.hidden + (32 * length * shape.heads if eager else 0)
    head = shape.vocabulary * shape.hidden * (shape.fast + shape.stored)
    logits = 6 * 4 * min(DISTILLED_LOGITS, shape.vocabulary * batch)
    streams = max(layers * own, held_out // task.processes) * shape.hidden * 4
    states = layers * (int(12 * trained) + task.dtype.itemsize * shape.layer) + streams
    saved = saved_for_backward(task.source.sizes, length, eager=eager)
    beside = layers * (8 - task.dtype.itemsize) * shape.layer + (layers - 1) * batch * saved
    weights = shape.walked(4) + int(8 * trained) + 4 * shape.layer
    return Need(weights + batch * kept + head + logits, states, beside)


def saved_for_backward(sizes: Sizes, length: int, *, eager: bool) -> int:
    """Bytes that a layer keeps of each token until its backward pass, in float32; in bfloat16 it is less.

    Args:
        sizes: The model's.
        length: Tokens per sequence.
        eager: Whether the attention keeps its weights.
    """
    return 16 * sizes.intermediate + 48 * sizes.hidden + (6 * length * sizes.heads if eager else 0)


def gptq(task: Task, *, desc_act: bool, joint: bool, head: bool) -> Need:
    """The Hessian and its factor; the stacked weight, the rounded weight, its error and its codes. Of the
    output layer, if it is quantized, some rows, and its codes.
    """
    shape, tokens = _Shape.of(task), task.own * task.length
    solving = hessian = 0
    for sizes in _inputs(task, head):
        rows, columns = sum(size[0] for size in sizes), sizes[0][1]
        # float32, and in bfloat16 the upper half of the first batch's product
        hessian = max(hessian, 5 * columns**2)
        copies = 3 if desc_act else 2
        panel = 6 * min(4096, columns) * columns
        solving = max(solving, 4 * copies * columns**2 + rows * columns * (4 + 4 + 1 + 2 + 4) + panel)
        if joint:
            hessian = max(hessian, 8 * 2 * columns**2)  # moments of the learning and held-out samples
            solving = max(solving, 8 * 4 * columns**2)
    item = shape.exact if joint else shape.fast
    streams = tokens * item * ((5 if joint else 3) * shape.hidden + shape.intermediate)
    walks = 2 if joint else 1
    # the stored layer stays mapped beside the new one
    weights = walks * shape.walked(item) + shape.layer * item + head * shape.vocabulary * shape.hidden
    return Need(weights + max(solving, shape.batch(_batch(tokens, task.length), item) + hessian), streams)


def _inputs(task: Task, head: bool) -> list[list[tuple[int, int]]]:
    """(out_features, in_features) of the linear layers that are solved together."""
    source = task.source
    groups = [[source.linear_shape(linear.name) for linear in group] for group in source.arch.inputs]
    return groups + [[(min(ROWS, source.sizes.vocabulary), source.sizes.hidden)]] * head


def one_layer(task: Task) -> Need:
    """One layer, or the largest tensor outside the layers."""
    shape = _Shape.of(task)
    outer = shape.vocabulary * shape.hidden * shape.stored
    return Need(max(shape.layer * (2 * shape.stored + 4), outer))


def measuring(task: Task, sequences: int | None, length: int) -> Need:
    """Perplexity: the hidden states of all sequences, and the logits of one."""
    shape = _Shape.of(task)
    own = -(-(sequences or 1024) // task.processes)
    item = shape.exact
    head = shape.vocabulary * shape.hidden * (item + shape.stored) + length * shape.vocabulary * 8
    compute = max(shape.walked(item) + shape.batch(_batch(own * length, length), item), head)
    return Need(compute, own * length * shape.hidden * item)


def _batch(tokens: int, length: int) -> int:
    """Tokens per batch."""
    return min(tokens, max(TOKENS_PER_BATCH, length))


def _holes(size: int) -> int:
    """Bytes that a fragmented heap takes for `size` bytes of tensors."""
    return int(1.2 * size)
