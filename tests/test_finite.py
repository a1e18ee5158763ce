"""NaN and infinity are found in every type, wherever they are and whatever stands beside them."""

import pytest
import torch

from mkaq.checkpoint.finite import all_finite

TYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan, -torch.nan])
@pytest.mark.parametrize("layout", ["whole", "strided"])
def test_one_bad_value_among_good_ones_is_found(dtype: torch.dtype, bad: float, layout: str) -> None:
    limits = torch.finfo(dtype)
    good = [0.0, -0.0, limits.max, limits.min, limits.tiny, -limits.tiny, limits.smallest_normal / 2, -1.0]
    values = torch.tensor(good, dtype=torch.float64).to(dtype).repeat(40).reshape(8, 40)
    assert all_finite(values if layout == "whole" else values.T)
    for place in (0, 7, 319):
        broken = values.clone()
        broken.view(-1)[place] = bad
        assert not all_finite(broken if layout == "whole" else broken.T)


@pytest.mark.parametrize("dtype", TYPES)
def test_nan_of_either_sign_and_any_payload_is_found(dtype: torch.dtype) -> None:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    infinity = int(torch.tensor(torch.inf, dtype=dtype).view(integer))
    lowest = -(1 << (8 * dtype.itemsize - 1))
    for bits in (infinity + 1, -lowest - 1, lowest + infinity + 1, -1):
        value = torch.tensor([1, bits, 1], dtype=integer).view(dtype)
        assert bool(value.isnan()[1]) and not all_finite(value)


def test_nothing_is_finite() -> None:
    assert all_finite(torch.zeros(0, 3))
    assert all_finite(torch.zeros((), requires_grad=True))
    assert not all_finite(torch.tensor(torch.inf))
