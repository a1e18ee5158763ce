"""Batches of samples with about the same number of tokens."""

from collections.abc import Iterator

import torch

TOKENS_PER_BATCH = 4096


def batches(hidden_states: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of consecutive samples, about `TOKENS_PER_BATCH` tokens each."""
    yield from (hidden_states[rows] for rows in spans(hidden_states))


def spans(hidden_states: torch.Tensor) -> Iterator[slice]:
    """The slices of samples that form the batches of `batches`."""
    size, samples = batch_size(hidden_states), len(hidden_states)
    yield from (slice(start, min(start + size, samples)) for start in range(0, samples, size))


def batch_size(hidden_states: torch.Tensor) -> int:
    """The number of samples in a batch."""
    return max(1, TOKENS_PER_BATCH // hidden_states.shape[1])
