"""The recorded errors of an artifact's own weights, measured again on the held-out calibration tokens.

What a selection or a regression would choose today is never asked: sums of floats come out otherwise on
another number of threads or processes, or in another type, and an honest artifact must pass there too.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from mkaq.arch.parts import attention_parts, mlp_parts
from mkaq.fit.final_norm import norm_error
from mkaq.fit.hold_out import Samples, held_out_error, token_weights
from mkaq.fit.residuals import residuals
from mkaq.fit.targets import advance
from mkaq.walk.hooks import input_of
from mkaq.walk.walk import LayerWalk

if TYPE_CHECKING:
    from mkaq.stages.base import FinalNorm
    from mkaq.stages.merge import MergeRecord

Rows = Callable[[slice], tuple[torch.Tensor, torch.Tensor]]
"""What a linear layer reads for some samples, and what it should give."""


class Tolerance(NamedTuple):
    """How far an error may be from the recorded one."""

    relative: float
    absolute: float

    def faults(self, what: str, found: float, told: float) -> Iterator[str]:
        """One, unless the two are near enough."""
        if not math.isclose(found, told, rel_tol=self.relative, abs_tol=self.absolute):
            yield f"{what} leaves an error of {found:.6g}, the manifest says {told:.6g}"

    def __str__(self) -> str:
        return f"to {self.relative:.0%} or {self.absolute:g}"


EXACT = Tolerance(0.02, 1e-5)  # both in float32
ROUNDED = Tolerance(0.05, 1e-3)  # hidden states in 16 bits, here or there: every layer adds their rounding


def tolerance(measured_in: str | None, dtype: torch.dtype) -> Tolerance:
    """What is allowed between the type in which errors were measured and the one that verifies."""
    return EXACT if measured_in == "float32" and dtype == torch.float32 else ROUNDED


def residual_errors(
    told: Sequence[float],
    norm: "FinalNorm | None",
    groups: Sequence[Sequence[int]],
    source: LayerWalk,
    walk: LayerWalk,
    samples: Samples,
    near: Tolerance,
) -> Iterator[str]:
    """What does not hold of the errors that were recorded after each layer, and of the final norm.

    Args:
        told: The recorded errors of the layers.
        norm: What is recorded of the final norm.
        groups: For each layer the layers of the source that it stands for.
        source: Over the source.
        walk: Over the artifact.
        samples: Held-out ones.
        near: How near is near enough.
    """
    found = residuals(source, walk, groups, samples)
    for new, pair in enumerate(zip(found.layers, told, strict=True)):
        yield from near.faults(f"layer {new}", *pair)
    if norm:
        yield from near.faults("the final norm", found.final_norm, norm.error)


def merge_faults(
    step: "MergeRecord",
    source: LayerWalk,
    walk: LayerWalk,
    samples: Samples,
    near: Tolerance,
) -> Iterator[str]:
    """What does not hold of the errors that were recorded of a fusion; arguments as for `residual_errors`."""
    original, states = source.embed(samples.tokens), walk.embed(samples.tokens)
    for new, (layer, group) in enumerate(zip(step.layers, step.groups(), strict=True)):
        told = layer.fused
        assert told is not None
        attention, mlp = _solved_errors(source, walk, group, new, original, states, samples)
        yield from near.faults(f"layer {new}: o_proj", attention, told.attention.error)
        yield from near.faults(f"layer {new}: down_proj", mlp, told.mlp.error)
        walk.pass_layer(new, states)
        residual = held_out_error(walk, samples, states, original)
        yield from near.faults(f"layer {new}", residual, told.residual)
    if step.final_norm:
        error = norm_error(source, walk, original, states, samples)
        yield from near.faults("the final norm", error, step.final_norm.error)


@torch.no_grad()
def _solved_errors(
    source: LayerWalk,
    walk: LayerWalk,
    group: Sequence[int],
    new: int,
    original: torch.Tensor,
    states: torch.Tensor,
    samples: Samples,
) -> tuple[float, float]:
    """What `o_proj` and `down_proj` miss, as shares of their targets' energies; moves `original` on."""
    arch, sizes = walk.checkpoint.arch, walk.checkpoint.sizes
    heads, channels = attention_parts(arch, sizes), mlp_parts(arch, sizes)
    attended = walk.activations.empty(tuple(original.shape), torch.float32)
    advance(source, group, heads.writer, original, states, attended)
    with walk.layer(new) as layer:

        def reached(name: str, rows: slice) -> torch.Tensor:
            return input_of(layer.get_submodule(name), partial(walk.run, layer, new, states[rows]))

        def heads_at(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
            return reached(heads.writer, rows), walk.fetch(attended[rows])

        def channels_at(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
            before = reached(channels.norm, rows).float()
            return reached(channels.writer, rows), walk.fetch(original[rows]).float() - before

        def missed(writer: str, rows_at: Rows) -> float:
            linear, sums = layer.get_submodule(writer), torch.zeros(2, dtype=torch.float64)
            assert isinstance(linear, nn.Linear)
            for rows in samples.halves()[1]:
                features, target = rows_at(rows)
                target = target if linear.bias is None else target - linear.bias
                error = target - nn.functional.linear(features, linear.weight)
                weights = token_weights(walk.fetch(original[rows]))
                for number, values in enumerate((error, target)):
                    sums[number] += float((weights * values.float().square().sum(-1)).double().sum())
                walk.activations.release()
            return float(sums[0] / sums[1]) if sums[1] > 0 else 0.0

        found = missed(heads.writer, heads_at), missed(channels.writer, channels_at)
    walk.activations.give_back(attended)
    return found
