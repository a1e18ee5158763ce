"""Gram matrices are X^T X, whatever the type, the size and the number of batches."""

import pytest
import torch

from mkaq.fit.gram import add_gram, factorize, inverse_of, mirror


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("features", [1, 64, 1024, 1500])
def test_sum_over_batches_is_the_direct_product(dtype: torch.dtype, features: int) -> None:
    rows = torch.randn(300, features, generator=torch.Generator().manual_seed(0))
    gram = torch.zeros(features, features, dtype=dtype)
    for batch in rows.split(128):
        add_gram(gram, batch)
    mirror(gram)
    expected = rows.double().T @ rows.double()
    assert torch.equal(gram, gram.T)
    assert torch.allclose(gram.double(), expected, rtol=1e-4, atol=1e-3)


def test_rows_of_any_layout_are_added() -> None:
    rows = torch.randn(64, 300, generator=torch.Generator().manual_seed(0)).T  # not contiguous
    gram = torch.zeros(64, 64)
    add_gram(gram, rows)
    mirror(gram)
    assert torch.allclose(gram, rows.T @ rows, rtol=1e-4, atol=1e-3)


def test_factor_is_made_in_place_where_there_is_one() -> None:
    rows = torch.randn(80, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = rows.T @ rows
    work = gram.clone()
    factor = factorize(work)
    assert factor is not None and factor.data_ptr() == work.data_ptr()
    assert torch.equal(factor, factor.tril()) and torch.allclose(factor @ factor.T, gram)
    assert factorize(-gram) is None


@pytest.mark.parametrize("size", [1, 128, 300, 1100])  # one stripe, and several
def test_inverse_is_made_in_the_memory_of_the_factor(size: int) -> None:
    rows = torch.randn(size + 10, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = rows.T @ rows
    factor = factorize(gram.clone())
    assert factor is not None
    inverse = inverse_of(factor)
    assert inverse.data_ptr() == factor.data_ptr() and torch.equal(inverse, inverse.T)
    assert torch.allclose(inverse @ gram, torch.eye(size, dtype=torch.float64), atol=1e-6)
