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


def solve_positive(matrices: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Solves A X = B for symmetric positive definite A, by Cholesky factors.

    Rounding can leave a matrix that was positive definite just short of it; as much as that takes is then
    added to the diagonals, from 1e-12 of the mean diagonal on. (Not by LU: a batched LU of MKL, in torch
    2.13, can spin for ever on blocks of about 192 or more.)

    Args:
        matrices: A, shape (..., n, n), float64.
        right: B, shape (..., n, k).

    Returns:
        X, shape (..., n, k).

    Raises:
        ArithmeticError: If a matrix is not positive definite with its mean diagonal added either.
    """
    mean = matrices.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=torch.finfo(matrices.dtype).tiny)
    for share in (0.0, *(10.0**power for power in range(-12, 1))):
        damped = matrices
        if share:
            damped = matrices.clone()
            damped.diagonal(dim1=-2, dim2=-1).add_((share * mean).unsqueeze(-1))
        factors, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed.any()):
            return torch.cholesky_solve(right, factors)
    raise ArithmeticError("a matrix is not positive definite")


def stripes(features: int) -> Iterator[tuple[int, int]]:
    """Where the stripes of the upper triangle begin and end: an eighth of the features each, as far as
    that fills a matrix product.
    """
    width = max(128, -(-features // _STRIPES))
    return ((start, min(start + width, features)) for start in range(0, features, width))
