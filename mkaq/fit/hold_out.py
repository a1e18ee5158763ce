"""The error of hidden states, and the samples that are held out to measure it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mkaq.fit.shuffle import half_in_random_order
from mkaq.ranks import ALONE, Ranks
from mkaq.walk.batches import spans
from mkaq.walk.walk import LayerWalk

HELD_OUT = 8


def held_out_samples(samples: int) -> int:
    """How many of all samples, the last ones, are kept for measuring: an eighth, at least one."""
    return max(1, samples // HELD_OUT)


@dataclass(frozen=True)
class Samples:
    """A process's part of the calibration samples: of those to learn from, then of those held out.

    Attributes:
        tokens: Token ids, shape (samples, length).
        held_out: How many of them, the last ones, are held out.
        first: The number of the first one among all that are to learn from.
    """

    tokens: torch.Tensor
    held_out: int
    first: int = 0

    @property
    def learned(self) -> int:
        """How many are to learn from."""
        return len(self.tokens) - self.held_out

    def held(self) -> "Samples":
        """Those that are held out, alone."""
        return Samples(self.tokens[self.learned :], self.held_out)

    def halves(self) -> tuple[list[slice], list[slice]]:
        """The batches of those to learn from, and of those that are held out."""
        learned, held = self.tokens[: self.learned], self.tokens[self.learned :]
        moved = [slice(self.learned + rows.start, self.learned + rows.stop) for rows in spans(held)]
        return list(spans(learned)), moved


def hold_out(tokens: torch.Tensor, ranks: Ranks = ALONE) -> Samples:
    """A process's part of the samples, the last eighth of all of them held out.

    Args:
        tokens: Of all processes, shape (samples, length).
        ranks: The processes.
    """
    learned = len(tokens) - held_out_samples(len(tokens))
    own, held = ranks.share(learned), ranks.share(len(tokens) - learned)
    part = tokens if ranks.size == 1 else torch.cat([tokens[own], tokens[learned:][held]])
    return Samples(part, held.stop - held.start, own.start)


def half_shuffled_samples(ranks: Ranks, tokens: torch.Tensor, seed: int) -> Samples:
    """`hold_out` of tokens of which every second sequence is in random order."""
    return hold_out(half_in_random_order(tokens, seed), ranks)


def token_weights(target: torch.Tensor) -> torch.Tensor:
    """What the squared error of a token counts: the inverse of its mean square.

    The norms of the layers that follow divide every token by just that; without it the few tokens
    with very large states would be all that is fitted.

    Args:
        target: Hidden states, shape (..., hidden_size).

    Returns:
        Shape (...), float32.
    """
    return 1 / target.float().square().mean(-1).clamp(min=torch.finfo(torch.float32).tiny)


def token_errors(states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """|states - target|^2 / |target|^2 of every token.

    Args:
        states: Shape (..., hidden_size).
        target: Of the same shape.

    Returns:
        Shape (...), float32.
    """
    return (states.float() - target.float()).square().mean(-1) * token_weights(target)


@torch.no_grad()
def held_out_error(walk: LayerWalk, samples: Samples, states: torch.Tensor, target: torch.Tensor) -> float:
    """The mean of `token_errors` over the held-out tokens of all processes.

    Args:
        walk: Whose device computes.
        samples: Which ones are held out.
        states: Shape (samples, length, hidden_size).
        target: Of the same shape.
    """
    return held_out_mean(walk, samples, lambda rows: (walk.fetch(states[rows]), walk.fetch(target[rows])))


def held_out_mean(
    walk: LayerWalk, samples: Samples, pair_at: Callable[[slice], tuple[torch.Tensor, torch.Tensor]]
) -> float:
    """The mean of `token_errors` over the held-out tokens of all processes, batch by batch.

    Args:
        walk: Whose device computes.
        samples: Which ones are held out.
        pair_at: States and targets of some samples, on the device.
    """
    total, count = 0.0, 0
    for rows in samples.halves()[1]:
        errors = token_errors(*pair_at(rows))
        total, count = total + float(errors.double().sum()), count + errors.numel()
        walk.activations.release()
    return walk.ranks.mean(total / max(1, count), count)
