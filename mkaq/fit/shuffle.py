"""Calibration tokens in an order that no text has, so that what is fitted to one domain serves others."""

import numpy as np
import torch


def half_in_random_order(tokens: torch.Tensor, seed: int) -> torch.Tensor:
    """Calibration tokens of which every second sequence is in random order.

    What is fitted to text of one domain alone forgets what other text needs. The same tokens in an order
    that no domain has keep it from that.

    Args:
        tokens: Shape (samples, length).
        seed: Of the orders.
    """
    result = tokens.clone()
    result[1::2] = in_random_order(tokens[1::2], seed)
    return result


def in_random_order(tokens: torch.Tensor, seed: int) -> torch.Tensor:
    """Every sequence in random order, but for a first token that all sequences share.

    Args:
        tokens: Shape (samples, length).
        seed: Of the order.
    """
    result = tokens.numpy().copy()
    first = int(bool((result[:, :1] == result[:1, :1]).all()))
    result[:, first:] = np.random.default_rng(seed).permuted(result[:, first:], axis=1)
    return torch.from_numpy(result)


def probing_tokens(tokens: torch.Tensor, seed: int) -> torch.Tensor:
    """What shows whether a model still does what another one does, in its domain and away from it.

    Args:
        tokens: Shape (samples, length).
        seed: Of what is random.

    Returns:
        The sequences, and for each one a random phrase of its tokens, a quarter of its length, repeated to
        the end: to copy is what a model does on any text (Olsson et al., In-context learning and induction
        heads, 2022). Shape (2 * samples, length).
    """
    repeated = in_random_order(tokens, seed)
    phrase = max(1, tokens.shape[1] // 4)
    for start in range(phrase, tokens.shape[1], phrase):
        rest = repeated[:, start : start + phrase]
        rest[:] = repeated[:, : rest.shape[1]]
    return torch.cat([tokens, repeated])
