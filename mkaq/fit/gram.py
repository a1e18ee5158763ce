"""Gram matrices X^T X, summed over batches in the upper triangle and then mirrored; Cholesky factors."""

from collections.abc import Iterator

import torch

_STRIPES = 8


def add_gram(gram: torch.Tensor, rows: torch.Tensor) -> None:
    """Adds X^T X to the upper triangle of a Gram matrix, in place.

    Args:
        gram: Shape (features, features), float32 or float64. The part below its diagonal is undefined until
            `mirror`.
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
    """Copies the upper triangle of a Gram matrix to the lower one, in place."""
    for start, stop in stripes(len(gram)):
        gram[stop:, start:stop] = gram[start:stop, stop:].T
        block = gram[start:stop, start:stop]
        block.copy_(block.triu() + block.triu(1).T)


def factorize(gram: torch.Tensor) -> torch.Tensor | None:
    """The lower Cholesky factor of a symmetric matrix, computed in its memory.

    Args:
        gram: Shape (n, n), contiguous; its contents are lost.

    Returns:
        Shape (n, n) with an upper triangle of zeros; None if the matrix is not positive definite.
    """
    columns = gram.mT  # the same matrix, column-major: LAPACK needs no copy
    failed = torch.empty((), dtype=torch.int32, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(columns, out=(columns, failed))
    return None if int(failed) else factor


def inverse_of(factor: torch.Tensor) -> torch.Tensor:
    """The inverse of A = L L^T, computed in the memory of L and of two stripes.

    Stripe by stripe, so that neither the zeros of L^-1 nor both halves of the result are computed. (torch's
    `cholesky_inverse` runs on one core of a CPU.)

    Args:
        factor: L, shape (n, n), with an upper triangle of zeros; its contents are lost.
    """
    _invert_triangle(factor)
    for start, stop in stripes(len(factor)):
        below = factor[start:]
        factor[start:stop, start:] = below[:, start:stop].T @ below[:, start:]
    mirror(factor)
    return factor


def _invert_triangle(lower: torch.Tensor) -> None:
    """Replaces L by L^-1: below block (i, i) it is -(L^-1 of the blocks after i) L_below,i L_ii^-1."""
    for start, stop in reversed([*stripes(len(lower))]):
        block, below = lower[start:stop, start:stop], lower[stop:, start:stop]
        one = torch.eye(len(block), dtype=lower.dtype, device=lower.device)
        block.copy_(torch.linalg.solve_triangular(block, one, upper=False))
        product = below @ block
        for first, last in stripes(len(product)):
            after = lower[stop + first : stop + last, stop : stop + last]
            below[first:last] = (after @ product[:last]).neg_()


def solve_positive(matrices: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Solves A X = B for symmetric positive definite A by Cholesky factorization.

    Rounding can make a positive definite matrix slightly indefinite. A fraction of the mean diagonal is then
    added to the diagonal, from 1e-12 upwards until the factorization succeeds. (LU is not used: a batched LU
    of MKL, in torch 2.13, can loop forever on blocks of about 192 or more.)

    Args:
        matrices: A, shape (..., n, n).
        right: B, shape (..., n, k).

    Returns:
        X, shape (..., n, k).

    Raises:
        ArithmeticError: If a matrix is not positive definite even with its mean diagonal added.
    """
    mean = matrices.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=torch.finfo(matrices.dtype).tiny)
    for fraction in (0.0, *(10.0**power for power in range(-12, 1))):
        damped = matrices
        if fraction:
            damped = matrices.clone()
            damped.diagonal(dim1=-2, dim2=-1).add_((fraction * mean).unsqueeze(-1))
        factors, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed.any()):
            return torch.cholesky_solve(right, factors)
    raise ArithmeticError("a matrix is not positive definite")


def stripes(features: int) -> Iterator[tuple[int, int]]:
    """Start and end of the stripes of the upper triangle: an eighth of the features each, at least 128.

    Narrower stripes would make poor matrix products.
    """
    width = max(128, -(-features // _STRIPES))
    return ((start, min(start + width, features)) for start in range(0, features, width))
