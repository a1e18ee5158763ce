"""How long a stage is expected to take: its floating-point operations, and the rate of this device.

Only products count, and what is of their order; the rate is measured on products of the model's own sizes,
and `EFFICIENCY` was set beside measured runs (`run.json` has both), so the result is good to a factor of two.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mkaq.arch.config import Sizes
from mkaq.checkpoint.reader import Checkpoint
from mkaq.fit.hold_out import held_out_samples
from mkaq.fit.ridge import RIDGES
from mkaq.merge.cost import SUBSAMPLING, probe_count
from mkaq.merge.solve import CANDIDATES
from mkaq.run.estimate import Task, Work
from mkaq.walk.device import compute_dtype

EFFICIENCY = 0.35  # of the rate of products that a whole stage reaches
DOUBLE = 2.0  # how much longer a product in float64 takes than one in float32
_PROBE = 0.05  # seconds


@dataclass(frozen=True)
class Rates:
    """Operations a second."""

    exact: float
    fast: float

    def seconds(self, work: Work) -> float:
        """How long work takes."""
        return (work.exact / self.exact + work.fast / self.fast) / EFFICIENCY


def measure_rates(source: Checkpoint, device: torch.device) -> Rates:
    """The rates of a device at products of a model's sizes, measured for a tenth of a second."""
    dtypes = (compute_dtype(source.dtype, device, fast=fast) for fast in (False, True))
    return Rates(*(_rate(source.sizes, dtype, device) for dtype in dtypes))


def _rate(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> float:
    rows = torch.ones(1024, sizes.hidden, dtype=dtype, device=device)
    weight = torch.ones(sizes.hidden, min(sizes.intermediate, 2**14), dtype=dtype, device=device)

    def run() -> None:
        (rows @ weight).flatten()[0].item()

    run()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < _PROBE:
        run()
        count += 1
    return 2 * rows.numel() * weight.shape[1] * count / (time.perf_counter() - began)


def _layer(task: Task) -> float:
    """Operations for a token in a layer: its weights, and attention over the sequence before it."""
    source = task.source
    weights = source.count_weights(source.layer_tensor_names(0))
    return 2.0 * weights + 2.0 * task.length * source.sizes.heads * source.sizes.head_dim


def walk(task: Task, tokens: int | None = None) -> float:
    """One pass over the layers of the source."""
    return (task.own * task.length if tokens is None else tokens) * task.source.num_layers * _layer(task)


def comparing(task: Task, points: int) -> float:
    """Hidden states at so many points, and a diffusion map of each layer."""
    return walk(task) + DOUBLE * task.source.num_layers * points**2 * (2 * task.source.sizes.hidden + 500)


def fusing(task: Task, layers: int) -> float:
    """All layers of the source, made so many: those that are merged in groups of about one size."""
    removed = task.source.num_layers - layers
    merged = min(removed, layers)
    groups = [1] * (layers - merged) + [1 + removed // merged] * merged
    return _fusing(task, groups, task.own * task.length)


def _fusing(task: Task, groups: Sequence[int], tokens: int) -> float:
    """Groups of so many layers, each made one: three runs of its layers, moments, selection, ridges."""
    sizes, work = task.source.sizes, 0.0
    for group in groups:
        kept = sizes.intermediate if group == 1 else int(CANDIDATES * sizes.intermediate)
        work += 3 * group * tokens * _layer(task) + tokens * kept * (kept + 2 * sizes.hidden)
        solving = sizes.intermediate**3 / 3 + 4 * sizes.intermediate**2 * sizes.hidden
        work += DOUBLE * ((len(RIDGES) + 1) * solving + 2 * kept**2 * (kept - sizes.intermediate))
    return work


def trying(task: Task, candidates: Sequence[tuple[int, int]], *, fuse: bool) -> float:
    """Candidate groups, each built from a part of the tokens and measured on others."""
    lengths = [length for _, length in candidates]
    sample = task.own * task.length // SUBSAMPLING
    built = _fusing(task, lengths, sample) if fuse else 7 * sum(lengths) * sample * _layer(task)
    probes = 2 * probe_count(task.own, max(1, len(candidates))) * task.length
    return built + len(candidates) * walk(task, probes) / 2


def tuning(task: Task, layers: int, steps: int, batch_size: int) -> float:
    """Steps of an optimizer in every layer, forward and backward, and errors on held-out samples."""
    held = held_out_samples(task.samples)
    batch = min(batch_size, max(1, task.samples - held)) / task.processes
    samples = 3 * steps * batch + 6 * held / task.processes
    return layers * samples * task.length * _layer(task)


def solving(task: Task, layers: int) -> float:
    """GPTQ: two runs of every layer, a Hessian for each input, its factor, and rounding against it."""
    source, tokens, work = task.source, task.own * task.length, 0.0
    for inputs in source.arch.inputs:
        shapes = [source.linear_shape(linear.name) for linear in inputs]
        rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
        work += tokens * columns**2 + columns**3 / 3 + 2 * rows * columns**2 / task.processes
        work += 21 * 8 * rows * columns  # the search for scales
    return layers * (work + 2 * tokens * _layer(task))


def rounding(task: Task, layers: int) -> float:
    """Quantizing every weight by itself."""
    return 100.0 * layers * task.source.count_weights(task.source.layer_tensor_names(0))


def measuring(task: Task, sequences: int | None, length: int) -> float:
    """Perplexity: a pass over the sequences, and their logits."""
    tokens = -(-(sequences or 1024) // task.processes) * length
    return walk(task, tokens) + 2.0 * tokens * task.source.sizes.hidden * task.source.sizes.vocabulary
