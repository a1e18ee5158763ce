"""Gram matrices X^T X, summed over batches: half is computed, half is its mirror image. Their factors."""

from collections.abc import Iterator

import torch

_STRIPES = 8


def add_gram(gram: torch.Tensor, rows: torch.Tensor) -> None:
    """Adds X^T X to the upper triangle of a Gram matrix, in place.

    Args:
        gram: Shape (features, features), float32 or float64. What is below its diagonal is not to be
            read before `mirror`.
        rows: X, shape (tokens, features), multiplied in float32.
    """
    rows = rows.float()
    for start, stop in stripes(rows.shape[1]):
        stripe, part = rows[:, start:stop], gram[start:stop, start:]
        if gram.dtype == rows.dtype:
            part.addmm_(stripe.T, rows[:, start:])
        else:
            part += stripe.T @ rows[:, start:]


def mirror(gram: torch.Tensor) -> None:
    """Fills the lower triangle of a Gram matrix from the upper one, in place."""
    for start, stop in stripes(len(gram)):
        gram[stop:, start:stop] = gram[start:stop, stop:].T
        block = gram[start:stop, start:stop]
        block.copy_(block.triu() + block.triu(1).T)


def factorize(gram: torch.Tensor) -> torch.Tensor | None:
    """The lower Cholesky factor of a symmetric matrix, made in its place.

    Args:
        gram: Shape (n, n), contiguous; its contents are lost.

    Returns:
        Shape (n, n), its upper triangle 0; None if the matrix is not positive definite.
    """
    columns = gram.mT  # the same matrix, in the order in which LAPACK needs no copy
    failed = torch.empty((), dtype=torch.int32, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(columns, out=(columns, failed))
    return None if int(failed) else factor


def stripes(features: int) -> Iterator[tuple[int, int]]:
    """Where the stripes of the upper triangle begin and end: an eighth of the features each, as far as
    that fills a matrix product.
    """
    width = max(128, -(-features // _STRIPES))
    return ((start, min(start + width, features)) for start in range(0, features, width))
