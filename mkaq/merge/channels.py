"""Fusing in function space: a kept layer takes over the heads and channels of those that it absorbs.

The new layer k stands for layers k..m. Its attention heads (by KV group) and MLP channels are chosen
among those of all of them, each evaluated at the new layer's own hidden state, and `o_proj` and
`down_proj` are solved in closed form so that the layer, on what the compressed model hands to it,
gives the hidden state that the original model has after layer m. A layer that absorbs nothing keeps
its parts and is solved too: it corrects the error that reaches it. The regressions weight every token
by the inverse of its mean square, as the norms of the layers that follow do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from mkaq.checkpoint.reader import Checkpoint
from mkaq.errors import UnsupportedError, UsageError
from mkaq.fit.hold_out import HELD_OUT, Samples, held_out_error, token_weights
from mkaq.fit.ridge import Fit, Moments, column_sizes, columns_of, fit, keep_columns
from mkaq.merge.parts import (
    Parts,
    all_parts,
    attention_parts,
    fold_norm,
    mlp_parts,
    part_columns,
    take_columns,
    take_parts,
)
from mkaq.ranks import Ranks
from mkaq.walk.batches import TOKENS_PER_BATCH, batches, spans
from mkaq.walk.hooks import input_of, outputs_of
from mkaq.walk.walk import LayerWalk

CANDIDATES = 1.5  # channels that may be kept, for each that is; those that write most
SELECTION_RIDGE = 1e-2
NEARLY_BEST = 0.9  # of what a ridge gains on held-out text of the calibration's domain

Rows = Callable[[slice], tuple[torch.Tensor, torch.Tensor]]
"""Features and target of some samples."""


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


def check_solvable(source: Checkpoint, samples: int, where: str, instead: str) -> None:
    """Refuses what has no closed form toward the source's hidden states.

    Args:
        source: The model.
        samples: Of the calibration.
        where: The setting that asks for it.
        instead: What to use otherwise.

    Raises:
        UnsupportedError: If there is a norm between `o_proj` or `down_proj` and the residual stream.
        UsageError: If there are too few samples to hold some out.
    """
    if samples < HELD_OUT:
        raise UsageError(
            f"{samples} samples are too few to solve on some and measure on others",
            where="calibration.num_samples",
            fix=f"use at least {HELD_OUT}, better 128 or more",
        )
    reason = "normalizes what its layers write" if source.arch.written_norms else ""
    if source.arch.parallel:
        reason = "runs attention and MLP side by side"
    if reason:
        what = f"{source.config['model_type']} {reason}, so no closed form exists"
        raise UnsupportedError(what, where=where, fix=f"use {instead}")


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
    candidates = [
        fold_norm(layer, heads, layers[0], dtype) | fold_norm(layer, channels, layers[0], dtype)
        for layer in layers
    ]
    new = untouched(layers, (heads, channels), dtype)
    modules = [walk.assemble(group[0], new | candidate) for candidate in candidates]

    def run_to(module: nn.Module, name: str, states: torch.Tensor) -> torch.Tensor:
        return input_of(module.get_submodule(name), partial(walk.run, module, group[0], states))

    def channels_of(module: nn.Module, normed: torch.Tensor) -> torch.Tensor:
        return input_of(
            module.get_submodule(channels.writer), partial(module.get_submodule(arch.mlp), normed)
        )

    def heads_at(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.cat([run_to(m, heads.writer, compressed[rows]) for m in modules], -1)
        return features, _without_bias(walk.fetch(attended[rows]), new, heads)

    def channels_at(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        states = walk.fetch(compressed[rows])
        normed = attentive.get_submodule(channels.norm)(states)
        features = torch.cat([channels_of(m, normed) for m in modules], -1)
        return features, _without_bias(walk.fetch(original[rows]).float() - states, new, channels)

    def strongest(parts: Parts, rows_at: Rows) -> torch.Tensor:
        rows = first_batch(samples)
        writers = torch.cat([layer[f"{parts.writer}.weight"] for layer in layers], 1)
        sizes = torch.zeros(writers.shape[1], device=walk.device)
        if len(original[rows]):  # or all of them are other processes'
            features, weights = rows_at(rows)[0], token_weights(walk.fetch(original[rows]))
            sizes += column_sizes(features.flatten(0, -2), weights.reshape(-1), writers)
        walk.ranks.add(sizes)
        strong = sizes.topk(int(CANDIDATES * parts.count)).indices.sort().values
        return walk.ranks.from_first(strong).cpu()

    def moments_at(parts: Parts, origins: torch.Tensor, rows_at: Rows, batches: Sequence[slice]) -> Moments:
        columns = part_columns(parts, origins).to(walk.device)
        moments = moments_of(walk, len(columns))
        for rows in batches:
            features, target = rows_at(rows)
            chosen = features if len(columns) == features.shape[-1] else features[..., columns]
            add_rows(moments, chosen, target, walk.fetch(original[rows]))
            walk.activations.release()
        add_up(walk.ranks, moments)
        return moments

    def solve(parts: Parts, rows_at: Rows) -> tuple[torch.Tensor, Fit]:
        learn, held = samples.halves()
        origins = all_parts(len(group), parts)
        if parts.width == 1 and len(group) > 1:
            origins = origins[strongest(parts, rows_at)]
        moments = moments_at(parts, origins, rows_at, learn)
        if len(group) > 1:
            chosen = choose_together(walk.ranks, moments, parts)
            origins = origins[chosen.cpu()]
            moments = moments.select(columns_of(chosen, parts.width))
        held_out = moments_at(parts, origins, rows_at, held)
        prior = take_columns(layers, parts, origins).to(walk.device)
        solved = fit_together(walk.ranks, moments, held_out, prior, NEARLY_BEST)
        new.update(take_parts(candidates, parts, origins))
        rounded = solved.weight.to(dtype)
        new[f"{parts.writer}.weight"] = rounded.cpu()
        origins[:, 0] += group[0]
        if solved.ridge is not None:
            solved = replace(solved, error=walk.ranks.tell(held_out.error(rounded)))
        return origins.to(torch.int32), solved

    head_origins, attention = solve(heads, heads_at)
    walk.activations.give_back(attended)
    attentive = walk.assemble(group[0], new)
    for rows in spans(compressed):
        compressed[rows] = run_to(attentive, channels.norm, compressed[rows])
    channel_origins, mlp = solve(channels, channels_at)
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


def advance(
    walk: LayerWalk,
    group: Sequence[int],
    writer: str,
    original: torch.Tensor,
    compressed: torch.Tensor,
    attended: torch.Tensor,
) -> None:
    """Moves the original stream past the group; puts into `attended` what the new attention should add.

    That is what the group's attention adds in the original, and the error of the compressed stream, in
    float32: of two streams in a shorter type the difference would be little but rounding.
    """
    for target, *streams in zip(batches(attended), batches(original), batches(compressed), strict=True):
        before, now = map(walk.fetch, streams)
        target.copy_(before.float() - now.float())
        walk.activations.release()
    for index in group:
        with walk.layer(index) as layer, outputs_of(layer.get_submodule(writer)) as seen:
            for states, target in zip(batches(original), batches(attended), strict=True):
                states.copy_(walk.run(layer, index, states))
                target.copy_(walk.fetch(target) + seen.pop())
                walk.activations.release()


def first_batch(samples: Samples) -> slice:
    """A process's part of the first batch of all samples, which is the same for any number of processes."""
    size = max(1, TOKENS_PER_BATCH // samples.tokens.shape[1])
    return slice(0, min(max(0, size - samples.first), samples.learned))


def choose_together(ranks: Ranks, moments: Moments, parts: Parts) -> torch.Tensor:
    """The parts to keep, shape (count,); of several processes the first one chooses."""
    if ranks.main:
        return ranks.from_first(keep_columns(moments, parts.count, SELECTION_RIDGE, parts.width))
    device = moments.cross.device
    return ranks.from_first(torch.empty(parts.count, dtype=torch.int64, device=device))


def fit_together(
    ranks: Ranks, moments: Moments, held_out: Moments, prior: torch.Tensor, nearly: float
) -> Fit:
    """`fit`; of several processes the first one does it."""
    if not ranks.main:
        ridge, error, before = ranks.tell()
        weight = torch.empty(prior.shape, device=prior.device)
        return Fit(ranks.from_first(weight), ridge, error, before)
    own = fit(moments, held_out, prior, nearly)
    ranks.tell((own.ridge, own.error, own.error_before))
    return replace(own, weight=ranks.from_first(own.weight.contiguous()))


def moments_of(walk: LayerWalk, features: int) -> Moments:
    """Empty moments of what a layer writes from some features."""
    return Moments(features, walk.checkpoint.sizes.hidden, walk.device)


def add_rows(moments: Moments, features: torch.Tensor, target: torch.Tensor, final: torch.Tensor) -> None:
    """Adds tokens to moments, each weighted by the inverse mean square of its hidden state, `final`."""
    moments.add(features.flatten(0, -2), target.flatten(0, -2), token_weights(final).reshape(-1))


def add_up(ranks: Ranks, *moments: Moments) -> None:
    """Adds the moments of all processes, so that each has those of all tokens."""
    for sums in moments:
        energy = torch.tensor([sums.energy], dtype=torch.float64, device=sums.gram.device)
        ranks.add(sums.gram, sums.cross, energy)
        sums.energy = float(energy)


def _without_bias(target: torch.Tensor, new: Mapping[str, torch.Tensor], parts: Parts) -> torch.Tensor:
    bias = new.get(f"{parts.writer}.bias")
    return target if bias is None else target - bias.to(target.device, target.dtype)
