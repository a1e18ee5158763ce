"""What merging a group of layers would do to the model, measured for every candidate in one walk."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from mkaq.fit.hold_out import HELD_OUT, Samples, half_shuffled_samples, held_out_error
from mkaq.fit.shuffle import probing_tokens
from mkaq.merge.average import merge_layers
from mkaq.merge.channels import fuse
from mkaq.progress import Progress
from mkaq.walk.batches import spans
from mkaq.walk.walk import LayerWalk

SHARE = 8
PROBES = 24
LOGITS = 2**24  # logits that are in memory at once, of each of a few tensors
COEFFICIENTS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)

Head = Callable[[torch.Tensor], torch.Tensor]
"""From outputs of the last layer to logits."""
Build = Callable[[Sequence[int], torch.Tensor, torch.Tensor, Samples], Mapping[str, torch.Tensor]]


def measure_groups(
    walk: LayerWalk,
    tokens: torch.Tensor,
    seed: int,
    candidates: Sequence[tuple[int, int]],
    build: Build,
    progress: Progress,
) -> dict[tuple[int, int], float]:
    """Merges every candidate group on its own and measures what the model's output loses by it.

    Each is built on the original hidden states before it, from a part of the tokens; what it makes of
    other tokens then goes through the rest of the original model, together with those of all others, so
    that one walk over the source serves all, whatever its depth. Half of these are no text, since what
    suits text of the calibration's domain may not suit any other.

    Args:
        walk: Over the source.
        tokens: Token ids of text, shape (samples, length).
        seed: Of what is random.
        candidates: First layer and number of layers of each.
        build: Merges a group: takes it, the two streams (original and compressed) before it, which it
            may change, and their samples, and returns the new layer's tensors by their names below it.
        progress: Told of every layer.

    Returns:
        For each candidate the mean Kullback-Leibler divergence of its next-token distributions from the
        source's, in nats.
    """
    sample, probes = split_samples(tokens, walk.ranks.size, len(candidates))
    samples, probes = half_shuffled_samples(walk.ranks, sample, seed), probing_tokens(probes, seed)
    probes = probes[walk.ranks.share(len(probes))]
    hidden_states, expected = walk.embed(samples.tokens), walk.embed(probes)
    merged: dict[tuple[int, int], torch.Tensor] = {}
    for index in progress.track(range(walk.num_layers), "measure groups"):
        for start, length in candidates:
            if start == index:
                streams = walk.activations.copy(hidden_states), walk.activations.copy(hidden_states)
                layer = walk.assemble(start, build(range(start, start + length), *streams, samples))
                for states in streams:
                    walk.activations.give_back(states)
                merged[start, length] = walk.activations.copy(expected)
                walk.run_all(layer, start, merged[start, length])
        with walk.layer(index) as layer:
            walk.run_all(layer, index, hidden_states)
            walk.run_all(layer, index, expected)
            for (start, length), states in merged.items():
                if start + length <= index:
                    walk.run_all(layer, index, states)
    nats = torch.zeros(len(merged), dtype=torch.float64, device=walk.device)
    streams_of, step = (expected, *merged.values()), max(1, LOGITS // walk.checkpoint.sizes.vocabulary)
    with walk.head() as head:
        for rows in spans(expected):
            original, *others = (states[rows].reshape(-1, states.shape[-1]) for states in streams_of)
            for start in range(0, len(original), step):
                part = slice(start, start + step)
                made = (walk.fetch(states[part]) for states in others)
                nats += divergences(head, made, walk.fetch(original[part]))
            walk.activations.release()
    count = probes.numel()
    means = (nats / max(1, count)).tolist()
    found = {group: walk.ranks.mean(mean, count) for group, mean in zip(merged, means, strict=True)}
    return dict(zip(found, walk.ranks.tell(list(found.values())), strict=True))


def probe_count(samples: int, candidates: int) -> int:
    """How many of the samples measure candidates."""
    return max(1, min(PROBES, samples // 4, 5 * samples // (4 * candidates)))


def split_samples(tokens: torch.Tensor, processes: int, candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The samples from which candidates are built, and others on which they are measured.

    The more candidates there are, the fewer samples measure them, so that all of them together cost little
    more than a walk over `tokens`, whatever the depth. Of too few samples to spare any, all build. Up to
    eight processes build and measure on the same samples as one does.

    Args:
        tokens: Shape (samples, length).
        processes: Among which each part is shared.
        candidates: How many there are.
    """
    probes = probe_count(len(tokens), candidates)
    others = tokens[:-probes] if len(tokens) - probes >= HELD_OUT else tokens
    sample = others[:: max(1, min(SHARE, len(others) // max(16, 2 * processes)))]
    return sample[: len(sample) // HELD_OUT * HELD_OUT or len(sample)], tokens[-probes:]


@torch.no_grad()
def divergences(head: Head, streams: Iterable[torch.Tensor], original: torch.Tensor) -> torch.Tensor:
    """Sums over tokens of KL(p || q) in nats, p the original's next-token distribution, q another's.

    Args:
        head: The final norm and the output layer, as `LayerWalk.head` gives them.
        streams: Outputs of the last layer of several models, each of shape (tokens, hidden_size).
        original: Those of the original model, of the same shape.

    Returns:
        One for each stream, float64.
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
    """Fuses a group."""
    return lambda group, original, compressed, samples: (
        fuse(walk, group, original, compressed, samples, dtype).tensors
    )


def by_average(walk: LayerWalk, coefficient: float | None) -> Build:
    """Averages a group, at its best coefficient unless one is given."""

    def build(
        group: Sequence[int], original: torch.Tensor, compressed: torch.Tensor, samples: Samples
    ) -> Mapping[str, torch.Tensor]:
        share = coefficient
        if share is None:
            share = best_average(walk, group, original, compressed, samples)[0]
        return merge_layers(
            {index: walk.layer_tensors(index) for index in group}, chain_weights(group, share)
        )

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
    """Averages a group from its first layer on, every merge with the same coefficient.

    Moves both streams past the group, in place, the compressed one by the best average.

    Args:
        walk: Over the source.
        group: Neighbouring layers.
        original: Hidden states of the source before them.
        compressed: Hidden states that the compressed model hands on.
        samples: Which ones are held out.
        coefficient: Of the earlier layers; the best of `COEFFICIENTS` if None.

    Returns:
        The coefficient, and the mean of |output - original|^2 / |original|^2 over held-out tokens.
    """
    layers = {index: walk.layer_tensors(index) for index in group}
    for index in group:
        walk.pass_layer(index, original)
    activations = walk.activations
    tried, kept = activations.empty_like(compressed), activations.empty_like(compressed)
    best: tuple[float, float] | None = None
    for share in COEFFICIENTS if coefficient is None else (coefficient,):
        activations.overwrite(tried, compressed)
        module = walk.assemble(group[0], merge_layers(layers, chain_weights(group, share)))
        walk.run_all(module, group[0], tried)
        error = held_out_error(walk, samples, tried, original)
        if walk.ranks.tell(best is None or error < best[1]):
            best, tried, kept = (share, error), kept, tried
    assert best is not None
    activations.overwrite(compressed, kept)
    activations.give_back(tried)
    activations.give_back(kept)
    return best


def chain_weights(group: Sequence[int], coefficient: float) -> dict[int, float]:
    """The weights of layers that are merged one after another into the first."""
    weights = {group[0]: 1.0}
    for index in group[1:]:
        weights = {old: weight * coefficient for old, weight in weights.items()} | {index: 1 - coefficient}
    return weights
