"""The error of hidden states, and the samples held out to measure it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mkaq.fit.shuffle import part_in_random_order
from mkaq.ranks import ALONE, Ranks
from mkaq.walk.batches import spans
from mkaq.walk.walk import LayerWalk

HELD_OUT = 8


def held_out_samples(samples: int) -> int:
    """The number of samples held out, the last ones: an eighth, at least one."""
    return max(1, samples // HELD_OUT)


@dataclass(frozen=True)
class Samples:
    """A process's calibration samples: first those to learn from, then the held-out ones.

    Attributes:
        tokens: Token ids, shape (samples, length).
        held_out: The number of held-out samples, the last ones.
        first: The index of the first sample among the samples of all processes to learn from.
    """

    tokens: torch.Tensor
    held_out: int
    first: int = 0

    @property
    def num_train(self) -> int:
        """The number of samples to learn from."""
        return len(self.tokens) - self.held_out

    def held_out_only(self) -> "Samples":
        """Only the held-out samples."""
        return Samples(self.tokens[self.num_train :], self.held_out)

    def splits(self) -> tuple[list[slice], list[slice]]:
        """The batches to learn from and the held-out batches."""
        learned, held = self.tokens[: self.num_train], self.tokens[self.num_train :]
        moved = [slice(self.num_train + rows.start, self.num_train + rows.stop) for rows in spans(held)]
        return list(spans(learned)), moved


def hold_out(tokens: torch.Tensor, ranks: Ranks = ALONE) -> Samples:
    """A process's share of the samples; of all samples the last eighth is held out.

    Args:
        tokens: The samples of all processes, shape (samples, length).
        ranks: The processes.
    """
    learned = len(tokens) - held_out_samples(len(tokens))
    own, held = ranks.slice_of(learned), ranks.slice_of(len(tokens) - learned)
    part = tokens if ranks.size == 1 else torch.cat([tokens[own], tokens[learned:][held]])
    return Samples(part, held.stop - held.start, own.start)


def calibration_samples(ranks: Ranks, tokens: torch.Tensor, seed: int) -> Samples:
    """`hold_out` of tokens after every fourth sequence is put in random order."""
    return hold_out(part_in_random_order(tokens, seed), ranks)


def token_weights(target: torch.Tensor) -> torch.Tensor:
    """The weight of a token's squared error: the inverse of the mean square of its target.

    The norms of later layers divide every token by the same value. Without the weight the fit would be
    dominated by the few tokens with very large states.

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
        walk: The walk whose device computes.
        samples: The samples, some of them held out.
        states: Shape (samples, length, hidden_size).
        target: Of the same shape.
    """
    return held_out_mean(
        walk, samples, lambda rows: (walk.to_device(states[rows]), walk.to_device(target[rows]))
    )


def held_out_mean(
    walk: LayerWalk, samples: Samples, pair_at: Callable[[slice], tuple[torch.Tensor, torch.Tensor]]
) -> float:
    """The mean of `token_errors` over the held-out tokens of all processes, batch by batch.

    Args:
        walk: The walk whose device computes.
        samples: The samples, some of them held out.
        pair_at: Returns states and targets of some samples, on the device.
    """
    total, count = 0.0, 0
    for rows in samples.splits()[1]:
        errors = token_errors(*pair_at(rows))
        total, count = total + float(errors.double().sum()), count + errors.numel()
        walk.activations.release()
    return walk.ranks.mean(total / max(1, count), count)
