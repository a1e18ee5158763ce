"""The costs of merging candidate groups of layers, all measured in one walk."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from mkaq.checkpoint.finished import Finished
from mkaq.fit.hold_out import HELD_OUT, Samples, calibration_samples, held_out_error
from mkaq.fit.shuffle import probing_tokens
from mkaq.merge.average import merge_layers
from mkaq.merge.channels import fuse
from mkaq.progress import Progress
from mkaq.walk.batches import spans
from mkaq.walk.walk import LayerWalk

SUBSAMPLING = 8
PROBES = 24
LOGITS = 2**24  # logits in memory at once, in each of a few tensors
_OUTPUTS = "outputs"  # of a candidate, for the probing tokens
COEFFICIENTS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)

Head = Callable[[torch.Tensor], torch.Tensor]
"""Maps last-layer outputs to logits."""
Build = Callable[[Sequence[int], torch.Tensor, torch.Tensor, Samples], Mapping[str, torch.Tensor]]
"""Merges a group: takes the group, the original and compressed hidden states before it (both may be
overwritten) and their samples; returns the new layer's tensors by name below the layer."""


def measure_groups(
    walk: LayerWalk,
    tokens: torch.Tensor,
    seed: int,
    candidates: Sequence[tuple[int, int]],
    build: Build,
    progress: Progress,
    finished: Finished,
) -> dict[tuple[int, int], float]:
    """Merges every candidate group alone and measures how far the model's output diverges.

    Each group is merged on the original hidden states before it, from a subset of the tokens. Its outputs on
    the probing tokens then pass through the remaining original layers together with those of all other
    candidates, so one walk over the source measures them all. Half of the probing tokens are not text: what
    suits text of the calibration's domain may not suit other text.

    Args:
        walk: A walk over the source.
        tokens: Token ids of text, shape (samples, length).
        seed: Seed of the shuffles.
        candidates: First layer and number of layers of each group.
        build: Merges a group.
        progress: Reports every layer.
        finished: What candidates measured before this was stopped gave; gets that of those that are measured.

    Returns:
        For each candidate, the mean KL(p || q) in nats of the next-token distributions p of the source and q
        of the merged model.
    """
    sample, probes = split_samples(tokens, walk.ranks.size, len(candidates))
    samples, probes = calibration_samples(walk.ranks, sample, seed), probing_tokens(probes, seed)
    own, every = walk.ranks.slice_of(len(probes)), len(probes)
    probes = probes[own]
    hidden_states, expected = walk.embed(samples.tokens), walk.embed(probes)
    merged: dict[tuple[int, int], torch.Tensor] = {}
    for index in progress.track(range(walk.num_layers), "measure groups"):
        for number, (start, length) in enumerate(candidates):
            if start == index:
                after = merged[start, length] = walk.activations.copy(expected)
                if found := finished.find(number):
                    walk.activations.overwrite(after, found[0][_OUTPUTS][own])
                    continue
                streams = walk.activations.copy(hidden_states), walk.activations.copy(hidden_states)
                layer = walk.assemble(start, build(range(start, start + length), *streams, samples))
                for states in streams:
                    walk.activations.recycle(states)
                walk.run_all(layer, start, after)
                gathered = walk.ranks.gather(walk.to_device(after), every)
                finished.keep(number, {_OUTPUTS: gathered.cpu()}, None)
        with walk.layer(index) as layer:
            walk.run_all(layer, index, hidden_states)
            walk.run_all(layer, index, expected)
            for (start, length), states in merged.items():
                if start + length <= index:
                    walk.run_all(layer, index, states)
    nats = torch.zeros(len(merged), dtype=torch.float64, device=walk.device)
    all_states, step = (expected, *merged.values()), max(1, LOGITS // walk.checkpoint.sizes.vocabulary)
    with walk.head() as head:
        for rows in spans(expected):
            original, *others = (states[rows].reshape(-1, states.shape[-1]) for states in all_states)
            for start in range(0, len(original), step):
                part = slice(start, start + step)
                outputs = (walk.to_device(states[part]) for states in others)
                nats += divergences(head, outputs, walk.to_device(original[part]))
            walk.activations.release()
    count = probes.numel()
    means = (nats / max(1, count)).tolist()
    costs = {group: walk.ranks.mean(mean, count) for group, mean in zip(merged, means, strict=True)}
    return dict(zip(costs, walk.ranks.broadcast(list(costs.values())), strict=True))


def probe_count(samples: int, candidates: int) -> int:
    """The number of samples on which candidates are measured."""
    return max(1, min(PROBES, samples // 4, 5 * samples // (4 * candidates)))


def holds_out(samples: int, candidates: int) -> bool:
    """Whether there are enough samples to measure candidates on others than those that build them."""
    return samples - probe_count(samples, candidates) >= HELD_OUT


def split_samples(tokens: torch.Tensor, processes: int, candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits the samples into those that build candidates and those that measure them.

    More candidates are measured on fewer samples, so the total cost stays close to that of one walk over
    `tokens`. With too few samples to spare any, all of them build. Up to eight processes build and measure on
    the same samples as one.

    Args:
        tokens: Token ids, shape (samples, length).
        processes: Processes that share each part.
        candidates: Candidates to measure.
    """
    probes = probe_count(len(tokens), candidates)
    others = tokens[:-probes] if holds_out(len(tokens), candidates) else tokens
    sample = others[:: _step(len(others), processes)]
    return sample[: len(sample) // HELD_OUT * HELD_OUT or len(sample)], tokens[-probes:]


def built_on(samples: int, candidates: int, processes: int) -> int:
    """About the number of samples that build candidates, of all processes."""
    others = max(1, samples - probe_count(samples, candidates))
    return -(-others // _step(others, processes))


def _step(samples: int, processes: int) -> int:
    return max(1, min(SUBSAMPLING, samples // max(16, 2 * processes)))


@torch.no_grad()
def divergences(head: Head, streams: Iterable[torch.Tensor], original: torch.Tensor) -> torch.Tensor:
    """Sums KL(p || q) over tokens, in nats; p is the original's next-token distribution, q another model's.

    Args:
        head: The final norm and output layer, as `LayerWalk.head` yields them.
        streams: Last-layer outputs of several models, each of shape (tokens, hidden_size).
        original: Last-layer outputs of the original model, of the same shape.

    Returns:
        One sum for each stream, float64.
    """
    log_p = _logits(head, original).log_softmax(-1)
    p = log_p.exp()
    negative_entropy = log_p.mul_(p).sum(-1)
    sums = []
    for states in streams:
        q = _logits(head, states)  # -log q = logsumexp - logit
        nats = negative_entropy + q.logsumexp(-1) - (p.unsqueeze(-2) @ q.unsqueeze(-1))[..., 0, 0]
        sums.append(nats.double().sum())
    return torch.stack(sums)


def _logits(head: Head, states: torch.Tensor) -> torch.Tensor:
    return head(states[None])[0].float()


def by_channels(walk: LayerWalk, dtype: torch.dtype) -> Build:
    """A `Build` that fuses a group."""
    return lambda group, original, compressed, samples: (
        fuse(walk, group, original, compressed, samples, dtype).tensors
    )


def by_average(walk: LayerWalk, coefficient: float | None) -> Build:
    """A `Build` that averages a group, with the best coefficient if None is given."""

    def build(
        group: Sequence[int], original: torch.Tensor, compressed: torch.Tensor, samples: Samples
    ) -> Mapping[str, torch.Tensor]:
        c = coefficient
        if c is None:
            c = best_average(walk, group, original, compressed, samples)[0]
        return merge_layers(walk.layer_tensors, chain_weights(group, c))

    return build


@torch.no_grad()
def best_average(
    walk: LayerWalk,
    group: Sequence[int],
    original: torch.Tensor,
    compressed: torch.Tensor,
    samples: Samples,
    coefficient: float | None = None,
) -> tuple[float, float]:
    """Averages a group into its first layer, one layer after another, with one coefficient for all.

    Advances both streams past the group, in place; `compressed` through the best average.

    Args:
        walk: A walk over the source.
        group: Neighbouring layers.
        original: The source's hidden states before the group.
        compressed: The compressed model's hidden states there.
        samples: Their samples.
        coefficient: Weight of the earlier layers; the best of `COEFFICIENTS` if None.

    Returns:
        The coefficient, and the mean of |output - original|^2 / |original|^2 over held-out tokens.
    """
    for index in group:
        walk.pass_layer(index, original)
    activations = walk.activations
    tried, kept = activations.empty_like(compressed), activations.empty_like(compressed)
    best: tuple[float, float] | None = None
    for c in COEFFICIENTS if coefficient is None else (coefficient,):
        activations.overwrite(tried, compressed)
        module = walk.assemble(group[0], merge_layers(walk.layer_tensors, chain_weights(group, c)))
        walk.run_all(module, group[0], tried)
        error = held_out_error(walk, samples, tried, original)
        if walk.ranks.broadcast(best is None or error < best[1]):
            best, tried, kept = (c, error), kept, tried
    assert best is not None
    activations.overwrite(compressed, kept)
    activations.recycle(tried)
    activations.recycle(kept)
    return best


def chain_weights(group: Sequence[int], coefficient: float) -> dict[int, float]:
    """Weights of layers merged one after another into the first: theta <- c theta + (1 - c) theta_m."""
    weights = {group[0]: 1.0}
    for index in group[1:]:
        weights = {old: weight * coefficient for old, weight in weights.items()} | {index: 1 - coefficient}
    return weights
