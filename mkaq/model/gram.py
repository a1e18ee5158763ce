"""Gram matrices X^T X, summed over batches: half of one is computed, the rest is its mirror image."""

import torch

_STRIPE = 1024


def add_gram(gram: torch.Tensor, rows: torch.Tensor) -> None:
    """Adds X^T X to the upper triangle of a Gram matrix, in place.

    Args:
        gram: Shape (features, features), float32 or float64. What is below its diagonal is not to be
            read before `mirror`.
        rows: X, shape (tokens, features), float32.
    """
    for start in range(0, rows.shape[1], _STRIPE):
        stripe = rows[:, start : start + _STRIPE]
        part = gram[start : start + _STRIPE, start:]
        if gram.dtype == rows.dtype:
            part.addmm_(stripe.T, rows[:, start:])
        else:
            part += stripe.T @ rows[:, start:]


def mirror(gram: torch.Tensor) -> None:
    """Fills the lower triangle of a Gram matrix from the upper one, in place."""
    for start in range(0, len(gram), _STRIPE):
        stop = min(start + _STRIPE, len(gram))
        gram[stop:, start:stop] = gram[start:stop, stop:].T
