"""Perplexity, measured by a walk, so that a model larger than memory can be evaluated."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mkaq.progress import Progress
from mkaq.walk.walk import LayerWalk


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and the amount of text behind it.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per predicted token; infinite if that is NaN or
            more than a float holds.
        standard_error: Its standard error, from the spread over sequences (delta method); None for a single
            sequence, or an infinite perplexity.
        tokens: The number of predicted tokens.
        sequences: The number of sequences, each predicted without context from the others.
    """

    perplexity: float
    standard_error: float | None
    tokens: int
    sequences: int

    def as_json(self) -> dict[str, Any]:
        """The form recorded in the manifest; an infinite perplexity, which JSON does not have, is null."""
        return asdict(self) | ({} if math.isfinite(self.perplexity) else {"perplexity": None})


@torch.no_grad()
def perplexity(
    walk: LayerWalk, sequences: list[list[int]], progress: Progress, what: str = "perplexity"
) -> Perplexity:
    """Token-weighted perplexity of a model.

    Args:
        walk: The model.
        sequences: Token ids; all of one length except the last, which may be shorter.
        progress: Shows every layer.
        what: The label of the progress.
    """
    length, total = len(sequences[0]), len(sequences)
    sequences = sequences[walk.ranks.slice_of(total)]
    groups = [[s for s in sequences if len(s) == length], [s for s in sequences if len(s) != length]]
    states = [(torch.tensor(group), walk.embed(torch.tensor(group))) for group in groups if group]
    for index in progress.track(range(walk.num_layers), what):
        with walk.layer(index) as layer:
            for _, hidden_states in states:
                walk.run_all(layer, index, hidden_states)
    losses, counts = [], []
    with walk.head() as head:
        for input_ids, hidden_states in states:
            for row, state in zip(input_ids, hidden_states, strict=True):
                embeds = walk.to_device(state[None])
                logits = head(embeds)[0, :-1].float()
                targets = row[1:].to(logits.device)
                losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item())
                counts.append(len(targets))
    joined = walk.ranks.gather(
        torch.tensor([losses, counts], dtype=torch.float64, device=walk.device).T, total
    )
    losses, counts = joined[:, 0].tolist(), joined[:, 1].long().tolist()
    return summarize(losses, counts)


def summarize(losses: list[float], counts: list[int]) -> Perplexity:
    """Token-weighted perplexity from the summed loss (nats) and the token count of each sequence."""
    mean, error = mean_per_token(losses, counts)
    if not mean < 700:
        return Perplexity(math.inf, None, sum(counts), len(losses))
    value = math.exp(mean)
    return Perplexity(value, None if error is None else value * error, sum(counts), len(losses))


def mean_per_token(sums: list[float], counts: list[int]) -> tuple[float, float | None]:
    """The mean per token, and its standard error from the spread over sequences; None for a single one.

    Args:
        sums: The sum over the tokens of each sequence.
        counts: The number of tokens of each.
    """
    tokens, count = sum(counts), len(sums)
    mean = math.fsum(sums) / tokens
    spread = math.fsum((total - mean * own) ** 2 for total, own in zip(sums, counts, strict=True))
    return mean, math.sqrt(spread * count / (count - 1)) / tokens if count > 1 else None
