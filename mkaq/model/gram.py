"""Gram matrices X^T X, summed over batches: half is computed, half is its mirror image. Their factors."""

from collections.abc import Iterator

import torch

_STRIPES = 8


def add_gram(gram: torch.Tensor, rows: torch.Tensor, seen: int = 0) -> None:
    """Adds X^T X to the upper triangle of a Gram matrix, in place.

    Args:
        gram: Shape (features, features), float32 or float64. What is below its diagonal is not to be
            read before `mirror`.
        rows: X, shape (tokens, features). On a CPU bfloat16 is multiplied as such, all else in float32.
        seen: Tokens whose products `gram` holds already.
    """
    as_it_is = rows.dtype == torch.bfloat16 and rows.device.type == "cpu"
    rows = rows if as_it_is else rows.float()
    for start, stop in _stripes(rows.shape[1]):
        stripe, part = rows[:, start:stop], gram[start:stop, start:]
        if as_it_is:
            _add_bfloat16(part, stripe.T, rows[:, start:], seen)
        elif gram.dtype == rows.dtype:
            part.addmm_(stripe.T, rows[:, start:])
        else:
            part += stripe.T @ rows[:, start:]


def _add_bfloat16(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, seen: int) -> None:
    """Adds a product of bfloat16 matrices, which is summed in float32 but comes rounded to bfloat16.

    What the product should be, by the tokens seen so far, is taken off before it is rounded, and is
    added exactly: only the difference is rounded, a small part of the whole.
    """
    rounded = left.new_empty(total.shape)
    expected = torch.mul(total, len(right) / seen, out=rounded) if seen else left @ right
    total += torch.addmm(expected, left, right, beta=-1)
    total += expected


def mirror(gram: torch.Tensor) -> None:
    """Fills the lower triangle of a Gram matrix from the upper one, in place."""
    for start, stop in _stripes(len(gram)):
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


def _stripes(features: int) -> Iterator[tuple[int, int]]:
    """Where the stripes begin and end: an eighth each, as far as that fills a matrix product."""
    width = max(128, -(-features // _STRIPES))
    return ((start, min(start + width, features)) for start in range(0, features, width))
