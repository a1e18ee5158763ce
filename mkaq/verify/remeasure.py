"""The recorded errors of an artifact's own weights, measured again on the held-out calibration tokens.

Selections and regressions are not repeated: sums of floats differ with the number of threads and processes
and with the dtype, and an honest artifact must still pass.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from mkaq.arch.parts import attention_parts, mlp_parts
from mkaq.distill.loss import Predictions, divergence
from mkaq.distill.teacher import predictions_of
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
"""Input and target of a linear layer for some samples."""


class Tolerance(NamedTuple):
    """The allowed difference between a measured and a recorded error."""

    relative: float
    absolute: float

    def faults(self, what: str, measured: float, recorded: float) -> Iterator[str]:
        """Yields a fault if the two errors differ by more than the tolerance."""
        if not math.isclose(measured, recorded, rel_tol=self.relative, abs_tol=self.absolute):
            yield f"{what} leaves an error of {measured:.6g}, the manifest says {recorded:.6g}"

    def __str__(self) -> str:
        return f"to {self.relative:.0%} or {self.absolute:g}"


EXACT = Tolerance(0.02, 1e-5)  # both measured in float32
ROUNDED = Tolerance(0.05, 1e-3)  # either in 16 bits: the rounding of hidden states adds up over layers


def tolerance(measured_in: str | None, dtype: torch.dtype) -> Tolerance:
    """The tolerance between errors measured in one dtype and verified in another."""
    return EXACT if measured_in == "float32" and dtype == torch.float32 else ROUNDED


def residual_errors(
    recorded: Sequence[float],
    norm: "FinalNorm | None",
    groups: Sequence[Sequence[int]],
    source: LayerWalk,
    walk: LayerWalk,
    samples: Samples,
    allowed: Tolerance,
) -> Iterator[str]:
    """Yields the recorded errors of layer outputs and of the final norm that do not hold.

    Args:
        recorded: The recorded errors of the layers.
        norm: The record of the final norm.
        groups: For each layer, the source layers that it replaces.
        source: A walk over the source.
        walk: A walk over the artifact.
        samples: Held-out samples.
        allowed: The tolerance.
    """
    measured = residuals(source, walk, groups, samples)
    for new, pair in enumerate(zip(measured.layers, recorded, strict=True)):
        yield from allowed.faults(f"layer {new}", *pair)
    if norm:
        yield from allowed.faults("the final norm", measured.final_norm, norm.error)


@torch.no_grad()
def divergences_again(
    source: LayerWalk, walk: LayerWalk, tokens: torch.Tensor, learned: torch.Tensor, k: int
) -> float:
    """The mean of KL(source || artifact), of which all but the likeliest tokens count as one.

    Args:
        source: A walk over the source.
        walk: A walk over the artifact, in float32; its products are those of the distillation.
        tokens: Token ids, shape (samples, length).
        learned: Which predictions count, of the same shape.
        k: The likeliest tokens.
    """
    *_, (_, original) = source.hidden_states(tokens)
    with walk.autocast():
        *_, (_, states) = walk.hidden_states(tokens)
    with source.head() as head:
        told = Predictions(*(part.flatten(0, 1) for part in predictions_of(source, head, original, k)))
    found, length = torch.empty(learned.shape), tokens.shape[1]
    with walk.head() as head:
        for row, state in enumerate(states):
            part = Predictions(*(each[row * length : (row + 1) * length] for each in told)).to(walk.device)
            found[row] = divergence(head(walk.to_device(state)[None])[0], part)[0].cpu()
    return float(found[learned].double().mean())


def merge_faults(
    step: "MergeRecord",
    source: LayerWalk,
    walk: LayerWalk,
    samples: Samples,
    allowed: Tolerance,
) -> Iterator[str]:
    """Yields the recorded errors of a fusion that do not hold; arguments as for `residual_errors`."""
    original, states = source.embed(samples.tokens), walk.embed(samples.tokens)
    for new, (layer, group) in enumerate(zip(step.layers, step.groups(), strict=True)):
        recorded = layer.fused
        assert recorded is not None
        attention, mlp = _solved_errors(source, walk, group, new, original, states, samples)
        yield from allowed.faults(f"layer {new}: o_proj", attention, recorded.attention.error)
        yield from allowed.faults(f"layer {new}: down_proj", mlp, recorded.mlp.error)
        walk.pass_layer(new, states)
        residual = held_out_error(walk, samples, states, original)
        yield from allowed.faults(f"layer {new}", residual, recorded.residual)
    if step.final_norm:
        error = norm_error(source, walk, original, states, samples)
        yield from allowed.faults("the final norm", error, step.final_norm.error)


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
    """The fractions of their targets' energies that `o_proj` and `down_proj` miss; advances `original`."""
    arch, sizes = walk.checkpoint.arch, walk.checkpoint.sizes
    heads, channels = attention_parts(arch, sizes), mlp_parts(arch, sizes)
    attended = walk.activations.empty(tuple(original.shape), torch.float32)
    advance(source, group, heads.out_proj, original, states, attended)
    with walk.layer(new) as layer:

        def submodule_input(name: str, rows: slice) -> torch.Tensor:
            return input_of(layer.get_submodule(name), partial(walk.run, layer, new, states[rows]))

        def heads_at(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
            return submodule_input(heads.out_proj, rows), walk.to_device(attended[rows])

        def channels_at(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
            before = submodule_input(channels.norm, rows).float()
            return submodule_input(channels.out_proj, rows), walk.to_device(original[rows]).float() - before

        def missed(writer: str, rows_at: Rows) -> float:
            linear, sums = layer.get_submodule(writer), torch.zeros(2, dtype=torch.float64)
            assert isinstance(linear, nn.Linear)
            for rows in samples.splits()[1]:
                features, target = rows_at(rows)
                target = target if linear.bias is None else target - linear.bias
                error = target - nn.functional.linear(features, linear.weight)
                weights = token_weights(walk.to_device(original[rows]))
                for number, values in enumerate((error, target)):
                    sums[number] += float((weights * values.float().square().sum(-1)).double().sum())
                walk.activations.release()
            return float(sums[0] / sums[1]) if sums[1] > 0 else 0.0

        errors = missed(heads.out_proj, heads_at), missed(channels.out_proj, channels_at)
    walk.activations.recycle(attended)
    return errors
