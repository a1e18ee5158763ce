"""Fusing in function space: a new layer takes over heads and channels of a group of layers.

The new layer replaces layers k..m. Its attention heads (whole KV groups) and MLP channels are selected from
all layers of the group, each evaluated at the new layer's own hidden state. `o_proj` and `down_proj` are
solved in closed form so that the new layer, given the compressed model's hidden state, outputs the original's
hidden state after layer m. A group of one layer keeps its parts but is solved too, which corrects the error
of its input. The regressions weight every token by the inverse of its mean square, as the following norms do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from mkaq.arch.parts import Parts, attention_parts, mlp_parts
from mkaq.fit.hold_out import Samples, held_out_error
from mkaq.fit.ridge import Outcome
from mkaq.fit.targets import advance, without_bias
from mkaq.merge.parts import fold_norm, take_columns, take_parts
from mkaq.merge.solve import Candidates, Features, PartSolver
from mkaq.walk.batches import batches, spans
from mkaq.walk.hooks import input_of
from mkaq.walk.walk import LayerWalk

Run = Callable[[nn.Module, slice], None]
"""Runs a layer on some samples, at least up to the writer of one kind of part."""


@dataclass(frozen=True)
class FusedLayer:
    """A fused layer and how it was made.

    Attributes:
        group: The old layers that it replaces; the first gives its norms and its position.
        tensors: Its tensors by name below the layer.
        heads: Old layer and KV group number of each KV group, shape (KV groups, 2).
        channels: Old layer and channel number of each channel, shape (intermediate_size, 2).
        attention: How well `o_proj` was solved.
        mlp: How well `down_proj` was solved.
    """

    group: tuple[int, ...]
    tensors: dict[str, torch.Tensor]
    heads: torch.Tensor
    channels: torch.Tensor
    attention: Outcome
    mlp: Outcome


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

    Advances `original` past the group and `compressed` past the new attention, in place.

    Args:
        walk: A walk over the source.
        group: The layers, consecutive and ascending.
        original: The source's hidden states before the group, shape (samples, length, hidden_size).
        compressed: The compressed model's hidden states before the new layer, of the same shape.
        samples: Their samples.
        dtype: Type of the new tensors.
    """
    arch, sizes = walk.checkpoint.arch, walk.checkpoint.sizes
    heads, channels = attention_parts(arch, sizes), mlp_parts(arch, sizes)
    layers = [walk.layer_tensors(index) for index in group]
    attended = walk.activations.empty(tuple(original.shape), torch.float32)
    advance(walk, group, heads.out_proj, original, compressed, attended)
    new = untouched(layers, (heads, channels), dtype)
    solver = PartSolver(walk, group[0], original, samples, layers, dtype)

    def written_by(kind: Parts, part: str, run: Run) -> Candidates:
        """The parts of the group, as they are seen by what the new layer has before them."""
        rest = below(new, part, kind.norm)
        del rest[f"{kind.out_proj}.weight"]
        readers = [fold_norm(layer, kind, layers[0], dtype) for layer in layers]

        def features_of(origins: torch.Tensor) -> Features:
            modules = [
                walk.assemble(group[0], rest | take_parts(readers, kind, own), partial=True)
                for own in torch.split(origins, kind.count)  # as many as a layer has at a time
            ]
            return lambda rows: torch.cat(
                [input_of(each.get_submodule(kind.out_proj), partial(run, each, rows)) for each in modules],
                -1,
            )

        return Candidates(kind, readers, features_of)

    def attend(module: nn.Module, rows: slice) -> None:
        walk.run(module, group[0], compressed[rows])

    def attention_target(rows: slice) -> torch.Tensor:
        return without_bias(walk.to_device(attended[rows]), new, heads.out_proj)

    head_origins, attention = solver.solve(written_by(heads, arch.attention, attend), attention_target, new)
    walk.activations.recycle(attended)
    pass_attention(walk, group[0], new, compressed)

    def activate(module: nn.Module, rows: slice) -> None:
        normed = module.get_submodule(channels.norm)(walk.to_device(compressed[rows]))
        module.get_submodule(arch.mlp)(normed)

    def mlp_target(rows: slice) -> torch.Tensor:
        missing = walk.to_device(original[rows]).float() - walk.to_device(compressed[rows])
        return without_bias(missing, new, channels.out_proj)

    channel_origins, mlp = solver.solve(written_by(channels, arch.mlp, activate), mlp_target, new)
    return FusedLayer(tuple(group), new, head_origins, channel_origins, attention, mlp)


@torch.no_grad()
def pass_attention(
    walk: LayerWalk, first: int, tensors: Mapping[str, torch.Tensor], compressed: torch.Tensor
) -> None:
    """Advances the compressed stream through the attention of a fused layer, in place.

    Args:
        walk: A walk over the source.
        first: The first layer of the group.
        tensors: The fused layer's; those of its MLP may be missing.
        compressed: Hidden states before the layer, shape (samples, length, hidden_size).
    """
    arch, sizes = walk.checkpoint.arch, walk.checkpoint.sizes
    norms = attention_parts(arch, sizes).norm, mlp_parts(arch, sizes).norm
    module = walk.assemble(first, below(tensors, arch.attention, *norms), partial=True)
    for rows in spans(compressed):
        run = partial(walk.run, module, first, compressed[rows])
        compressed[rows] = input_of(module.get_submodule(norms[1]), run)


@torch.no_grad()
def pass_fused(
    walk: LayerWalk, layer: FusedLayer, original: torch.Tensor, compressed: torch.Tensor, samples: Samples
) -> float:
    """Advances the compressed stream through the MLP of a fused layer, in place.

    Args:
        walk: A walk over the source.
        layer: The fused layer.
        original: The source's hidden states after the group.
        compressed: Hidden states after the layer's attention, as `fuse` leaves them.
        samples: Their samples.

    Returns:
        Mean of |output - original|^2 / |original|^2 over held-out tokens.
    """
    first, arch = layer.group[0], walk.checkpoint.arch
    parts = mlp_parts(arch, walk.checkpoint.sizes)
    module = walk.assemble(first, layer.tensors)
    norm, mlp = module.get_submodule(parts.norm), module.get_submodule(arch.mlp)
    for states in batches(compressed):
        before = walk.to_device(states)
        states.copy_(walk.checked(before + mlp(norm(before)), first))
        walk.activations.release()
    return held_out_error(walk, samples, compressed, original)


def below(tensors: Mapping[str, torch.Tensor], *modules: str) -> dict[str, torch.Tensor]:
    """The tensors of some modules of a layer."""
    prefixes = tuple(f"{module}." for module in modules)
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}


def known_tensors(
    layers: Sequence[Mapping[str, torch.Tensor]],
    parts: Sequence[tuple[Parts, torch.Tensor]],
    dtype: torch.dtype,
    unsolved: Sequence[bool],
) -> dict[str, torch.Tensor]:
    """The tensors of a fused layer that follow from the source and the origins: all but the solved weights.

    Args:
        layers: The old layers of the group.
        parts: Heads and channels, each with their origins (position in `layers`, number).
        dtype: Type of the result.
        unsolved: For each of `parts`, whether its writer kept the original columns.
    """
    result = untouched(layers, [kind for kind, _ in parts], dtype)
    for (kind, origins), keeps_columns in zip(parts, unsolved, strict=True):
        result.update(
            take_parts([fold_norm(layer, kind, layers[0], dtype) for layer in layers], kind, origins)
        )
        del result[f"{kind.out_proj}.weight"]
        if keeps_columns:
            result[f"{kind.out_proj}.weight"] = take_columns(layers, kind, origins).to(dtype)
    return result


def untouched(
    layers: Sequence[Mapping[str, torch.Tensor]], kinds: Sequence[Parts], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The first layer's tensors; biases added to the residual stream are summed over the group."""
    new = {name: tensor.to(dtype) for name, tensor in layers[0].items()}
    for kind in kinds:
        if (bias := f"{kind.out_proj}.bias") in new:
            new[bias] = torch.stack([layer[bias].double() for layer in layers]).sum(0).to(dtype)
    return new
