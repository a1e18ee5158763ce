"""The error of hidden states, and the samples that are held out to measure it."""

import torch

from mkaq.calibrate.tokens import half_in_random_order
from mkaq.ranks import Ranks

HELD_OUT = 8


def held_out_samples(samples: int) -> int:
    """How many of the samples, the last ones, are kept for measuring: an eighth, at least one."""
    return max(1, samples // HELD_OUT)


def learning_samples(ranks: Ranks, tokens: torch.Tensor, seed: int) -> torch.Tensor:
    """A process's part of the samples to learn from and of those that are held out, half in random order.

    Raises:
        UsageError: If they cannot be shared so.
    """
    return ranks.samples(half_in_random_order(tokens, seed), held_out_samples(len(tokens)))


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


def mean_relative_error(states: torch.Tensor, target: torch.Tensor) -> float:
    """Mean over tokens of |states - target|^2 / |target|^2, both of shape (..., hidden_size)."""
    error = (states.float() - target.float()).square().mean(-1) * token_weights(target)
    return float(error.double().mean())


def held_out_error(states: torch.Tensor, target: torch.Tensor) -> float:
    """The same over the held-out samples alone, both of shape (samples, length, hidden_size)."""
    held = slice(len(target) - held_out_samples(len(target)), None)
    return mean_relative_error(states[held], target[held])
