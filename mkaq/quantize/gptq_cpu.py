"""The inner loops of GPTQ for a CPU, compiled by numba and run on all cores.

Rows are divided among Python threads; the compiled code runs without the GIL. Threads of numba or OpenMP
would change how many threads torch uses. Rows are independent, so the number of threads changes no result.

Each thread works on tiles of rows, stored with the rows next to one another, so that every inner loop can be
vectorized. The operations and their order are those of the plain version, except that sums add their terms in
another order.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch

from mkaq.quantize.gptq import SHRINK, Kernels

_CONTRACT = {"contract"}
_TILE = 64  # rows of a tile
_PARTS = 4  # parts of the rows per thread, which balance the load
_SHRINKS = np.array(SHRINK, dtype=np.float32)  # passed as an argument: a cached loop would keep old values
_TINY, _HUGE = np.float32(2.0**-24), np.float32(65504)


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba.njit with a cache on disk where one can be written.

    A division by 0 is no error: the check would prevent vectorization.
    """
    options["error_model"] = "numpy"

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no folder is writable: every process compiles again
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
    by_row = [
        t.numpy() for t in (target.contiguous(), carried.contiguous(), scales, zeros, codes, error, loss)
    ]
    shared = [local.T.contiguous().numpy(), importance.numpy(), groups.numpy(), _SHRINKS]
    _run_on_rows(_round_rows, by_row, *shared, search, sym, top, middle)
    return codes, error, loss


def find_scales(
    weight: torch.Tensor, importance: torch.Tensor, bits: int, sym: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `gptq.find_scales`, for tensors on a CPU."""
    *shape, size = weight.shape
    grouped = weight.reshape(len(weight), -1, size).contiguous()
    importances = importance.reshape(-1, size).contiguous()
    scales = torch.empty(grouped.shape[:2])
    zeros = torch.empty(grouped.shape[:2], dtype=torch.int32)
    by_row = [grouped.numpy(), scales.numpy(), zeros.numpy()]
    _run_on_rows(_search_rows, by_row, importances.numpy(), _SHRINKS, sym, *_levels(bits))
    return scales.reshape(shape), zeros.reshape(shape)


def _levels(bits: int) -> tuple[Any, Any]:
    return np.float32(2**bits - 1), np.float32(2 ** (bits - 1))


def _run_on_rows(kernel: Callable[..., None], by_row: list[Any], *shared: Any) -> None:
    """Runs a kernel on parts of the rows, in as many threads as torch uses.

    Args:
        kernel: Takes the arrays of `by_row`, then `shared`.
        by_row: Arrays to split by rows; those that the kernel fills must be contiguous.
        shared: Arguments that every thread gets unchanged.
    """
    rows, threads = len(by_row[0]), torch.get_num_threads()
    step = _TILE * max(1, -(-rows // (_TILE * _PARTS * threads)))
    parts = [[array[first : first + step] for array in by_row] for first in range(0, rows, step)]
    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(kernel, *part, *shared) for part in parts]:
            future.result()


@_compiled()
def _to_half(value: Any) -> Any:
    """The nearest float16, never 0 or infinite: Veltkamp's splitting keeps 11 of the 24 bits."""
    if value < np.float32(2.0**-14):
        return max(np.float32(np.rint(value * np.float32(2.0**24)) * _TINY), _TINY)
    large = value * np.float32(8193)
    return min(large - (large - value), _HUGE)


@_compiled(fastmath=_CONTRACT)
def _add_products(total: Any, factors: Any, values: Any, start: int, stop: int) -> None:
    """Adds sum_i factors[i] values[i] over i from `start` to `stop`, four terms at a time."""
    i = start
    while i + 4 <= stop:
        a, b, c, d = factors[i], factors[i + 1], factors[i + 2], factors[i + 3]
        for row in range(_TILE):
            total[row] += (
                a * values[i, row] + b * values[i + 1, row] + c * values[i + 2, row] + d * values[i + 3, row]
            )
        i += 4
    while i < stop:
        for row in range(_TILE):
            total[row] += factors[i] * values[i, row]
        i += 1


@_compiled(fastmath=_CONTRACT)
def _search(
    values: Any,
    importance: Any,
    start: int,
    stop: int,
    shrinks: Any,
    sym: bool,
    top: Any,
    middle: Any,
    scales: Any,
    zeros: Any,
) -> None:
    """`gptq.find_scales` for a tile of rows and the group of columns from `start` to `stop`."""
    low, high = np.zeros(_TILE, dtype=np.float32), np.zeros(_TILE, dtype=np.float32)
    for j in range(start, stop):
        for row in range(_TILE):
            low[row], high[row] = min(low[row], values[j, row]), max(high[row], values[j, row])
    if sym:
        for row in range(_TILE):
            high[row] = max(-low[row], high[row])
            low[row] = -high[row]
    best = np.full(_TILE, np.inf, dtype=np.float32)
    scale, zero = np.empty(_TILE, dtype=np.float32), np.empty(_TILE, dtype=np.float32)
    cost = np.empty(_TILE, dtype=np.float32)
    scales[:], zeros[:] = np.float32(1), middle
    for shrink in shrinks:
        for row in range(_TILE):
            scale[row] = _to_half((high[row] - low[row]) * shrink / top)
            nearest = np.float32(np.rint(-low[row] * shrink / scale[row]))
            zero[row] = middle if sym else min(max(nearest, np.float32(1)), top)
            cost[row] = np.float32(0)
        for j in range(start, stop):
            column_importance = importance[j]
            for row in range(_TILE):
                code = np.rint(values[j, row] / scale[row]) + zero[row]
                code = min(max(code, np.float32(0)), top)
                difference = (code - zero[row]) * scale[row] - values[j, row]
                cost[row] += difference * difference * column_importance
        for row in range(_TILE):
            if cost[row] < best[row]:
                best[row], scales[row], zeros[row] = cost[row], scale[row], zero[row]


@_compiled(nogil=True)
def _search_rows(
    weight: Any, scales: Any, zeros: Any, importance: Any, shrinks: Any, sym: bool, top: Any, middle: Any
) -> None:
    rows, groups, size = weight.shape
    tiles = (rows + _TILE - 1) // _TILE
    for number in range(tiles * groups):
        group, first = number // tiles, number % tiles * _TILE
        count = min(_TILE, rows - first)
        values = np.zeros((size, _TILE), dtype=np.float32)
        scale, zero = np.empty(_TILE, dtype=np.float32), np.empty(_TILE, dtype=np.float32)
        for row in range(count):
            for j in range(size):
                values[j, row] = weight[first + row, group, j]
        _search(values, importance[group], 0, size, shrinks, sym, top, middle, scale, zero)
        for row in range(count):
            scales[first + row, group], zeros[first + row, group] = scale[row], np.int32(zero[row])


@_compiled(nogil=True, fastmath=_CONTRACT)
def _round_rows(
    target: Any,
    carried: Any,
    scales: Any,
    zeros: Any,
    codes: Any,
    error: Any,
    loss: Any,
    columns: Any,
    importance: Any,
    groups: Any,
    shrinks: Any,
    search: bool,
    sym: bool,
    top: Any,
    middle: Any,
) -> None:
    """`round_block`, a tile of rows at a time; row j of `columns` is column j of R within the block."""
    rows, width = target.shape
    for number in range((rows + _TILE - 1) // _TILE):
        first = number * _TILE
        count = min(_TILE, rows - first)
        weights = np.zeros((width, _TILE), dtype=np.float32)  # the rows of a tile are next to one another
        correction = np.zeros((width, _TILE), dtype=np.float32)
        for row in range(count):
            for j in range(width):
                weights[j, row], correction[j, row] = target[first + row, j], carried[first + row, j]
        errors, shift = np.empty((width, _TILE), dtype=np.float32), np.empty((width, _TILE), dtype=np.float32)
        values = np.empty((width, _TILE), dtype=np.float32)  # shifted weights of a group, then codes
        scale, zero = np.ones(_TILE, dtype=np.float32), np.zeros(_TILE, dtype=np.float32)
        total = np.zeros(_TILE, dtype=np.float32)
        start = 0
        while start < width:
            group = groups[start]
            stop = start + 1
            while stop < width and groups[stop] == group:
                stop += 1
            for j in range(start, stop):
                _add_products(correction[j], columns[j], errors, 0, start)
            if search:
                for j in range(start, stop):
                    pivot, sums = columns[j, j], np.zeros(_TILE, dtype=np.float32)
                    _add_products(sums, columns[j], shift, start, j)
                    for row in range(_TILE):
                        shift[j, row] = (correction[j, row] - sums[row]) / pivot
                        values[j, row] = weights[j, row] + shift[j, row]
                _search(values, importance, start, stop, shrinks, sym, top, middle, scale, zero)
                for row in range(count):
                    scales[first + row, group], zeros[first + row, group] = scale[row], np.int32(zero[row])
            else:
                for row in range(count):
                    scale[row], zero[row] = scales[first + row, group], np.float32(zeros[first + row, group])
            for j in range(start, stop):
                _add_products(correction[j], columns[j], errors, start, j)
                pivot = columns[j, j]
                for row in range(_TILE):
                    code = np.rint((weights[j, row] + correction[j, row] / pivot) / scale[row]) + zero[row]
                    code = min(max(code, np.float32(0)), top)
                    values[j, row] = code
                    errors[j, row] = weights[j, row] - (code - zero[row]) * scale[row]
                    residual = correction[j, row] + pivot * errors[j, row]
                    total[row] += residual * residual
            start = stop
        for row in range(count):
            loss[first + row] = total[row]
            for j in range(width):
                codes[first + row, j], error[first + row, j] = np.uint8(values[j, row]), errors[j, row]


COMPILED = Kernels(find_scales, round_block)
