"""The inner loops of GPTQ for a CPU, compiled by numba, rows side by side on all cores.

Rows do not influence one another, so the number of threads changes no result. The operations are those
of the plain version in its order, but for sums, whose terms are added in another one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numba
import numpy as np
import torch

from mkaq.quantize.gptq import SHRINK, Kernels

_SUMS = {"reassoc", "contract"}
_SHRINK = np.array(SHRINK, dtype=np.float32)
_TINY, _HUGE = np.float32(2.0**-24), np.float32(65504)


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba.njit, kept on disk where there is a place to write."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no folder can be written: compiled again by every process
            return numba.njit(**options)(function)

    return decorate


def round_block(
    target: torch.Tensor,
    carried: torch.Tensor,
    local: torch.Tensor,
    importance: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    groups: torch.Tensor,
    *,
    search: bool,
    bits: int,
    sym: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `gptq.round_block`, for tensors on a CPU."""
    rows, width = target.shape
    codes = torch.empty(rows, width, dtype=torch.uint8)
    error, loss = torch.empty(rows, width), torch.empty(rows)
    top, middle = _levels(bits)
    with _threads():
        _round_rows(
            target.contiguous().numpy(),  # of one layout: numba compiles for each
            carried.contiguous().numpy(),
            local.T.contiguous().numpy(),
            importance.numpy(),
            scales.numpy(),
            zeros.numpy(),
            groups.numpy(),
            _SHRINK,
            search,
            sym,
            top,
            middle,
            codes.numpy(),
            error.numpy(),
            loss.numpy(),
        )
    return codes, error, loss


def find_scales(
    weight: torch.Tensor, importance: torch.Tensor, bits: int, sym: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `gptq.find_scales`, for tensors on a CPU."""
    *shape, size = weight.shape
    flat = weight.reshape(-1, size).contiguous()
    costs = importance.reshape(-1, size).contiguous()
    scales, zeros = torch.empty(len(flat)), torch.empty(len(flat), dtype=torch.int32)
    with _threads():
        _search_rows(flat.numpy(), costs.numpy(), _SHRINK, sym, *_levels(bits), scales.numpy(), zeros.numpy())
    return scales.reshape(shape), zeros.reshape(shape)


def _levels(bits: int) -> tuple[Any, Any]:
    return np.float32(2**bits - 1), np.float32(2 ** (bits - 1))


@contextmanager
def _threads() -> Iterator[None]:
    """As many threads as torch uses; numba's, which may be the same ones, leave torch's number changed."""
    threads = torch.get_num_threads()  # first: the other question may start numba's threads
    before = numba.get_num_threads()
    most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    numba.set_num_threads(min(threads, most))
    try:
        yield
    finally:
        numba.set_num_threads(before)
        torch.set_num_threads(threads)


@_compiled()
def _half(value: Any) -> Any:
    """The nearest float16, never 0 and never infinite: eleven bits are left of the 24 (Veltkamp's split)."""
    if value < np.float32(2.0**-14):
        return max(np.float32(np.rint(value * np.float32(2.0**24)) * _TINY), _TINY)
    large = value * np.float32(8193)
    return min(large - (large - value), _HUGE)


@_compiled(fastmath=_SUMS)
def _dot(a: Any, b: Any, start: int, stop: int) -> Any:
    total = np.float32(0)
    for i in range(start, stop):
        total += a[i] * b[i]
    return total


@_compiled(fastmath=_SUMS)
def _cost(values: Any, importance: Any, first: int, scale: Any, zero: Any, top: Any) -> Any:
    """What rounding costs with a scale and a zero point."""
    total = np.float32(0)
    for i in range(len(values)):
        code = min(max(np.rint(values[i] / scale) + zero, np.float32(0)), top)
        off = (code - zero) * scale - values[i]
        total += off * off * importance[first + i]
    return total


@_compiled()
def _search(
    values: Any, importance: Any, first: int, shrink: Any, sym: bool, top: Any, middle: Any
) -> tuple[Any, Any]:
    """`gptq.find_scales` of one row and group."""
    low, high = min(values.min(), np.float32(0)), max(values.max(), np.float32(0))
    if sym:
        high = max(-low, high)
        low = -high
    best, best_scale, best_zero = np.float32(np.inf), np.float32(1), middle
    for share in shrink:
        scale = _half((high - low) * share / top)
        zero = middle if sym else min(max(np.float32(np.rint(-low * share / scale)), np.float32(1)), top)
        cost = _cost(values, importance, first, scale, zero, top)
        if cost < best:
            best, best_scale, best_zero = cost, scale, zero
    return best_scale, best_zero


@_compiled(parallel=True)
def _search_rows(
    weight: Any, importance: Any, shrink: Any, sym: bool, top: Any, middle: Any, scales: Any, zeros: Any
) -> None:
    for row in numba.prange(len(weight)):
        costs = importance[row % len(importance)]
        found = _search(weight[row], costs, 0, shrink, sym, top, middle)
        scales[row], zeros[row] = found[0], np.int32(found[1])


@_compiled(parallel=True)
def _round_rows(
    target: Any,
    carried: Any,
    columns: Any,
    importance: Any,
    scales: Any,
    zeros: Any,
    groups: Any,
    shrink: Any,
    search: bool,
    sym: bool,
    top: Any,
    middle: Any,
    codes: Any,
    error: Any,
    loss: Any,
) -> None:
    """Rounds a block; row j of `columns` is column j of the factor."""
    rows, width = target.shape
    for row in numba.prange(rows):
        wish, values = np.empty(width, dtype=np.float32), np.empty(width, dtype=np.float32)
        own = error[row]
        total = np.float32(0)
        start = 0
        while start < width:
            group = groups[start]
            stop = start + 1
            while stop < width and groups[stop] == group:
                stop += 1
            if search:
                for j in range(start, stop):
                    debt = carried[row, j] + _dot(columns[j], own, 0, start)
                    wish[j] = (debt - _dot(columns[j], wish, start, j)) / columns[j, j]
                    values[j] = target[row, j] + wish[j]
                found = _search(values[start:stop], importance, start, shrink, sym, top, middle)
                scales[row, group], zeros[row, group] = found[0], np.int32(found[1])
            scale, zero = scales[row, group], np.float32(zeros[row, group])
            for j in range(start, stop):
                debt, pivot = carried[row, j] + _dot(columns[j], own, 0, j), columns[j, j]
                code = np.rint((target[row, j] + debt / pivot) / scale) + zero
                code = min(max(code, np.float32(0)), top)
                codes[row, j] = np.uint8(code)
                own[j] = target[row, j] - (code - zero) * scale
                left = debt + pivot * own[j]
                total += left * left
            start = stop
        loss[row] = total


COMPILED = Kernels(find_scales, round_block)
