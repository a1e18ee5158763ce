"""The recorded errors of an artifact's own weights, measured again on the held-out calibration tokens.

What a selection or a regression would choose today is never asked: sums of floats come out otherwise on
another number of threads or processes, or in another type, and an honest artifact must pass there too.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from mkaq.export.manifest import Manifest, MergeStep, QuantizeStep, RecoverStep
from mkaq.fit.final_norm import norm_error
from mkaq.fit.hold_out import Samples, held_out_error, token_weights
from mkaq.fit.residuals import residuals
from mkaq.merge.channels import advance
from mkaq.merge.parts import attention_parts, mlp_parts
from mkaq.verify.claims import weights_of
from mkaq.walk.hooks import input_of
from mkaq.walk.walk import LayerWalk

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


def tolerance(
    manifest: Manifest, step: MergeStep | RecoverStep | QuantizeStep, dtype: torch.dtype
) -> Tolerance:
    """What is allowed between the type in which a step's errors were measured and the one that verifies."""
    told = manifest.ran_on.get("residuals" if isinstance(step, QuantizeStep) else step.step)
    exact = told is not None and told.compute_dtype == "float32" and dtype == torch.float32
    return EXACT if exact else ROUNDED


def measure_again(manifest: Manifest, source: LayerWalk, walk: LayerWalk, samples: Samples) -> list[str]:
    """Measures what the last step that records errors of hidden states says of the artifact's weights.

    Args:
        manifest: Of the artifact.
        source: Over the source.
        walk: Over the artifact.
        samples: Held-out ones.

    Returns:
        The claims that do not hold.
    """
    merge = next((step for step in manifest.steps if isinstance(step, MergeStep)), None)
    groups = [[index] for index in range(source.num_layers)]
    if merge is not None:
        groups = [sorted(weights_of(layer)) for layer in merge.layers]
    step, near = manifest.steps[-1], tolerance(manifest, manifest.steps[-1], source.dtype)
    if isinstance(step, MergeStep):
        return list(_merge_faults(step, groups, source, walk, samples, near))
    if isinstance(step, QuantizeStep):
        told, norm = step.residuals or [], step.final_norm
    else:
        told, norm = [layer.error for layer in step.layers], step.final_norm
    found = residuals(source, walk, groups, samples)
    faults = [
        fault
        for new, pair in enumerate(zip(found.layers, told, strict=True))
        for fault in near.faults(f"layer {new}", *pair)
    ]
    return faults + list(near.faults("the final norm", found.final_norm, norm.error) if norm else [])


def _merge_faults(
    step: MergeStep,
    groups: Sequence[Sequence[int]],
    source: LayerWalk,
    walk: LayerWalk,
    samples: Samples,
    near: Tolerance,
) -> Iterator[str]:
    original, states = source.embed(samples.tokens), walk.embed(samples.tokens)
    for new, (layer, group) in enumerate(zip(step.layers, groups, strict=True)):
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
