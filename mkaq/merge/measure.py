"""What merging a group of layers would do to the model, measured for every candidate in one walk."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from mkaq.calibrate.tokens import with_copies
from mkaq.merge.apply import merge_layers
from mkaq.merge.fuse import fuse
from mkaq.merge.hold_out import HELD_OUT, held_out_error, held_out_samples, shared_samples
from mkaq.model.walk import LayerWalk, batches
from mkaq.progress import Progress

SHARE = 6
COEFFICIENTS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)

Build = Callable[[Sequence[int], torch.Tensor, torch.Tensor], float]


def measure_groups(
    walk: LayerWalk,
    tokens: torch.Tensor,
    seed: int,
    candidates: Sequence[tuple[int, int]],
    build: Build,
    progress: Progress,
) -> dict[tuple[int, int], float]:
    """Merges every candidate group on its own and measures what the model's output loses by it.

    Each is built on the original hidden states before it, from a part of the tokens; its held-out
    states then go through the rest of the original model, together with those of all others, so that
    one walk over the source serves all, whatever its depth.

    Args:
        walk: Over the source.
        tokens: Token ids of text, shape (samples, length).
        seed: Of the random phrases that are measured too.
        candidates: First layer and number of layers of each.
        build: Merges a group: takes it and the two streams (original and compressed) before it, moves
            both past it, and returns the error.
        progress: Told of every layer.

    Returns:
        For each candidate the mean Kullback-Leibler divergence of its next-token distributions from the
        source's over held-out tokens, in nats.
    """
    sample = tokens[:: max(1, min(SHARE, len(tokens) // 16))]
    if walk.ranks.size > 1:
        sample = sample[: _multiple(len(sample), HELD_OUT * walk.ranks.size)]
    sample = shared_samples(walk.ranks, with_copies(sample, seed))
    held = slice(len(sample) - held_out_samples(len(sample)), None)
    hidden_states = walk.embed(sample)
    merged: dict[tuple[int, int], torch.Tensor] = {}
    for index in progress.track(range(walk.num_layers), "measure groups"):
        for start, length in candidates:
            if start == index:
                compressed = hidden_states.clone()
                build(range(start, start + length), hidden_states.clone(), compressed)
                merged[start, length] = compressed[held].clone()
        with walk.layer(index) as layer:
            walk.run_all(layer, index, hidden_states)
            for (start, length), states in merged.items():
                if start + length <= index:
                    walk.run_all(layer, index, states)
    with walk.head() as head:
        return {
            group: walk.ranks.mean(divergence(head, states, hidden_states[held]))
            for group, states in merged.items()
        }


def _multiple(count: int, size: int) -> int:
    """The largest multiple of `size` up to `count`; `count` itself if there is none."""
    return count // size * size or count


@torch.no_grad()
def divergence(head: nn.Module, states: torch.Tensor, original: torch.Tensor) -> float:
    """Mean over tokens of KL(p || q) in nats, p the original's next-token distribution, q the other's.

    Args:
        head: The final norm and the output layer.
        states: Outputs of the last layer, shape (samples, length, hidden_size).
        original: Those of the original model, of the same shape.
    """
    total = 0.0
    for pair in zip(batches(original), batches(states), strict=True):
        p, q = (head(inputs_embeds=s, use_cache=False).logits.float().log_softmax(-1) for s in pair)
        total += float((p.exp() * (p - q)).sum(-1).double().sum())
    return total / states[..., 0].numel()


def channels_error(walk: LayerWalk, dtype: torch.dtype) -> Build:
    """The error that fusing a group leaves."""
    return lambda group, original, compressed: fuse(walk, group, original, compressed, dtype).residual


def average_error(walk: LayerWalk, coefficient: float | None) -> Build:
    """The error that averaging a group leaves, at its best coefficient unless one is given."""

    def build(group: Sequence[int], original: torch.Tensor, compressed: torch.Tensor) -> float:
        return best_average(walk, group, original, compressed, coefficient)[1]

    return build


@torch.no_grad()
def best_average(
    walk: LayerWalk,
    group: Sequence[int],
    original: torch.Tensor,
    compressed: torch.Tensor,
    coefficient: float | None = None,
) -> tuple[float, float]:
    """Averages a group from its first layer on, every merge with the same coefficient.

    Moves both streams past the group, in place, the compressed one by the best average.

    Args:
        walk: Over the source.
        group: Neighbouring layers.
        original: Hidden states of the source before them.
        compressed: Hidden states that the compressed model hands on.
        coefficient: Of the earlier layers; the best of `COEFFICIENTS` if None.

    Returns:
        The coefficient, and the mean of |output - original|^2 / |original|^2 over held-out tokens.
    """
    layers = {index: walk.layer_tensors(index) for index in group}
    for index in group:
        walk.pass_layer(index, original)
    best: tuple[float, float, torch.Tensor] | None = None
    for share in COEFFICIENTS if coefficient is None else (coefficient,):
        states = compressed.clone()
        module = walk.assemble(group[0], merge_layers(layers, chain_weights(group, share)))
        walk.run_all(module, group[0], states)
        error = walk.ranks.mean(held_out_error(states, original))
        if best is None or error < best[1]:
            best = (share, error, states)
    assert best is not None
    compressed.copy_(best[2])
    return best[0], best[1]


def chain_weights(group: Sequence[int], coefficient: float) -> dict[int, float]:
    """The weights of layers that are merged one after another into the first."""
    weights = {group[0]: 1.0}
    for index in group[1:]:
        weights = {old: weight * coefficient for old, weight in weights.items()} | {index: 1 - coefficient}
    return weights
