"""Fusing in function space: a kept layer takes over the heads and channels of those that it absorbs.

The new layer k stands for layers k..m. Its attention heads (by KV group) and MLP channels are chosen
among those of all of them, each evaluated at the new layer's own hidden state, and `o_proj` and
`down_proj` are solved in closed form so that the layer, on what the compressed model hands to it,
gives the hidden state that the original model has after layer m. A layer that absorbs nothing keeps
its parts and is solved too: it corrects the error that reaches it. The regressions weight every token
by the inverse of its mean square, as the norms of the layers that follow do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from mkaq.arch.parts import Parts, attention_parts, mlp_parts
from mkaq.fit.hold_out import Samples, held_out_error
from mkaq.fit.ridge import Fit
from mkaq.fit.targets import advance, without_bias
from mkaq.merge.parts import fold_norm, take_columns, take_parts
from mkaq.merge.solve import PartSolver
from mkaq.walk.batches import batches, spans
from mkaq.walk.hooks import input_of
from mkaq.walk.walk import LayerWalk


@dataclass(frozen=True)
class FusedLayer:
    """A new layer and how it came about.

    Attributes:
        group: The old layers that it stands for; the first gives its norms and its place.
        tensors: By their names below the layer.
        heads: Old layer and KV group of each of its KV groups, shape (KV groups, 2).
        channels: Old layer and channel of each of its channels, shape (intermediate_size, 2).
        attention: How `o_proj` was solved.
        mlp: How `down_proj` was solved.
    """

    group: tuple[int, ...]
    tensors: dict[str, torch.Tensor]
    heads: torch.Tensor
    channels: torch.Tensor
    attention: Fit
    mlp: Fit


@torch.no_grad()
def fuse(
    walk: LayerWalk,
    group: Sequence[int],
    original: torch.Tensor,
    compressed: torch.Tensor,
    samples: Samples,
    dtype: torch.dtype,
) -> FusedLayer:
    """Fuses neighbouring layers into one.

    Moves the original stream past them and the compressed one past the new attention, in place.

    Args:
        walk: Over the source.
        group: The layers, rising and without gaps.
        original: Hidden states of the source before the first of them, shape (samples, length,
            hidden_size).
        compressed: Hidden states that the compressed model hands on, of the same shape.
        samples: Which ones are held out.
        dtype: Of the new tensors.
    """
    arch, sizes = walk.checkpoint.arch, walk.checkpoint.sizes
    heads, channels = attention_parts(arch, sizes), mlp_parts(arch, sizes)
    layers = [walk.layer_tensors(index) for index in group]
    attended = walk.activations.empty(tuple(original.shape), torch.float32)
    advance(walk, group, heads.writer, original, compressed, attended)
    readers = [
        fold_norm(layer, heads, layers[0], dtype) | fold_norm(layer, channels, layers[0], dtype)
        for layer in layers
    ]
    new = untouched(layers, (heads, channels), dtype)
    modules = [walk.assemble(group[0], new | own) for own in readers]
    solver = PartSolver(walk, group[0], original, samples, layers, readers, dtype)

    def reached(module: nn.Module, name: str, rows: slice) -> torch.Tensor:
        return input_of(module.get_submodule(name), partial(walk.run, module, group[0], compressed[rows]))

    def heads_at(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.cat([reached(module, heads.writer, rows) for module in modules], -1)
        return features, without_bias(walk.fetch(attended[rows]), new, heads.writer)

    head_origins, attention = solver.solve(heads, heads_at, new)
    walk.activations.give_back(attended)
    attentive = walk.assemble(group[0], new)
    for rows in spans(compressed):
        compressed[rows] = reached(attentive, channels.norm, rows)

    def channels_at(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        states = walk.fetch(compressed[rows])
        normed = attentive.get_submodule(channels.norm)(states)
        features = [
            input_of(module.get_submodule(channels.writer), partial(module.get_submodule(arch.mlp), normed))
            for module in modules
        ]
        target = walk.fetch(original[rows]).float() - states
        return torch.cat(features, -1), without_bias(target, new, channels.writer)

    channel_origins, mlp = solver.solve(channels, channels_at, new)
    return FusedLayer(tuple(group), new, head_origins, channel_origins, attention, mlp)


@torch.no_grad()
def pass_fused(
    walk: LayerWalk, layer: FusedLayer, original: torch.Tensor, compressed: torch.Tensor, samples: Samples
) -> float:
    """Moves the compressed stream past the MLP of a fused layer, in place.

    Args:
        walk: Over the source.
        layer: The fused layer.
        original: Hidden states of the source after its group.
        compressed: Past its attention, as `fuse` leaves it.
        samples: Which ones are held out.

    Returns:
        Mean over held-out tokens of |output - original|^2 / |original|^2.
    """
    first, arch = layer.group[0], walk.checkpoint.arch
    parts = mlp_parts(arch, walk.checkpoint.sizes)
    module = walk.assemble(first, layer.tensors)
    norm, mlp = module.get_submodule(parts.norm), module.get_submodule(arch.mlp)
    for states in batches(compressed):
        before = walk.fetch(states)
        states.copy_(walk.checked(before + mlp(norm(before)), first))
        walk.activations.release()
    return held_out_error(walk, samples, compressed, original)


def known_tensors(
    layers: Sequence[Mapping[str, torch.Tensor]],
    parts: Sequence[tuple[Parts, torch.Tensor]],
    dtype: torch.dtype,
    left: Sequence[bool],
) -> dict[str, torch.Tensor]:
    """What follows from the source and the origins alone: all of a fused layer but what was solved.

    Args:
        layers: The old layers of the group.
        parts: Heads and channels, each with its origins (position in `layers`, number).
        dtype: Of the result.
        left: For each of `parts`, whether the writer was left as it was.
    """
    result = untouched(layers, [kind for kind, _ in parts], dtype)
    for (kind, origins), as_it_was in zip(parts, left, strict=True):
        result.update(
            take_parts([fold_norm(layer, kind, layers[0], dtype) for layer in layers], kind, origins)
        )
        del result[f"{kind.writer}.weight"]
        if as_it_was:
            result[f"{kind.writer}.weight"] = take_columns(layers, kind, origins).to(dtype)
    return result


def untouched(
    layers: Sequence[Mapping[str, torch.Tensor]], kinds: Sequence[Parts], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The first layer's tensors; the biases of what writes to the residual stream are summed."""
    new = {name: tensor.to(dtype) for name, tensor in layers[0].items()}
    for kind in kinds:
        if (bias := f"{kind.writer}.bias") in new:
            new[bias] = torch.stack([layer[bias].double() for layer in layers]).sum(0).to(dtype)
    return new
