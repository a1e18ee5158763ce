"""The inner loops of GPTQ for a CPU, compiled by numba, rows side by side on all cores.

Rows are shared out among threads of Python's own, which need no lock in compiled code. numba's threads, or
OpenMP's, would change how many torch uses.

Rows do not influence one another, so the number of threads changes no result. Tiles of rows are worked
on together, their numbers side by side in memory, so that every inner loop is one of vectors. The
operations are those of the plain version in its order, but for sums, whose terms are added in another one.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch

from mkaq.quantize.gptq import SHRINK, Kernels

_CONTRACT = {"contract"}
_TILE = 64  # rows that are worked on side by side
_PARTS = 4  # of the rows for each thread, so that none waits long for another
_SHRINK = np.array(SHRINK, dtype=np.float32)  # an argument: a cached loop would keep the old ones
_TINY, _HUGE = np.float32(2.0**-24), np.float32(65504)


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba.njit, kept on disk where there is a place to write; a division by 0 is no error, which would
    keep loops from being vectorized.
    """
    options["error_model"] = "numpy"

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
    by_row = [
        t.numpy() for t in (target.contiguous(), carried.contiguous(), scales, zeros, codes, error, loss)
    ]
    shared = [local.T.contiguous().numpy(), importance.numpy(), groups.numpy(), _SHRINK]
    _share_rows(_round_rows, by_row, *shared, search, sym, top, middle)
    return codes, error, loss


def find_scales(
    weight: torch.Tensor, importance: torch.Tensor, bits: int, sym: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `gptq.find_scales`, for tensors on a CPU."""
    *shape, size = weight.shape
    grouped = weight.reshape(len(weight), -1, size).contiguous()
    costs = importance.reshape(-1, size).contiguous()
    scales = torch.empty(grouped.shape[:2])
    zeros = torch.empty(grouped.shape[:2], dtype=torch.int32)
    by_row = [grouped.numpy(), scales.numpy(), zeros.numpy()]
    _share_rows(_search_rows, by_row, costs.numpy(), _SHRINK, sym, *_levels(bits))
    return scales.reshape(shape), zeros.reshape(shape)


def _levels(bits: int) -> tuple[Any, Any]:
    return np.float32(2**bits - 1), np.float32(2 ** (bits - 1))


def _share_rows(kernel: Callable[..., None], by_row: list[Any], *shared: Any) -> None:
    """Runs a kernel on rows, shared out among as many threads as torch uses.

    Args:
        kernel: Takes `by_row`, then `shared`.
        by_row: Arrays whose rows are shared out; those that it fills are contiguous.
        shared: What every thread gets whole.
    """
    rows, threads = len(by_row[0]), torch.get_num_threads()
    step = _TILE * max(1, -(-rows // (_TILE * _PARTS * threads)))
    parts = [[array[first : first + step] for array in by_row] for first in range(0, rows, step)]
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(kernel, *part, *shared) for part in parts]:
            done.result()


@_compiled()
def _half(value: Any) -> Any:
    """The nearest float16, never 0 and never infinite: eleven bits are left of the 24 (Veltkamp's split)."""
    if value < np.float32(2.0**-14):
        return max(np.float32(np.rint(value * np.float32(2.0**24)) * _TINY), _TINY)
    large = value * np.float32(8193)
    return min(large - (large - value), _HUGE)


@_compiled(fastmath=_CONTRACT)
def _add_products(total: Any, factors: Any, values: Any, start: int, stop: int) -> None:
    """Adds sum_i factors[i] values[i] over i from `start` to `stop`; four at a time."""
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
    shrink: Any,
    sym: bool,
    top: Any,
    middle: Any,
    scales: Any,
    zeros: Any,
) -> None:
    """`gptq.find_scales` of a tile of rows and the group of columns from `start` to `stop`."""
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
    for share in shrink:
        for row in range(_TILE):
            scale[row] = _half((high[row] - low[row]) * share / top)
            moved = np.float32(np.rint(-low[row] * share / scale[row]))
            zero[row] = middle if sym else min(max(moved, np.float32(1)), top)
            cost[row] = np.float32(0)
        for j in range(start, stop):
            weight = importance[j]
            for row in range(_TILE):
                code = np.rint(values[j, row] / scale[row]) + zero[row]
                code = min(max(code, np.float32(0)), top)
                off = (code - zero[row]) * scale[row] - values[j, row]
                cost[row] += off * off * weight
        for row in range(_TILE):
            if cost[row] < best[row]:
                best[row], scales[row], zeros[row] = cost[row], scale[row], zero[row]


@_compiled(nogil=True)
def _search_rows(
    weight: Any, scales: Any, zeros: Any, importance: Any, shrink: Any, sym: bool, top: Any, middle: Any
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
        _search(values, importance[group], 0, size, shrink, sym, top, middle, scale, zero)
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
    shrink: Any,
    search: bool,
    sym: bool,
    top: Any,
    middle: Any,
) -> None:
    """Rounds a block, a tile of rows at a time; row j of `columns` is column j of the factor."""
    rows, width = target.shape
    for number in range((rows + _TILE - 1) // _TILE):
        first = number * _TILE
        count = min(_TILE, rows - first)
        wanted = np.zeros((width, _TILE), dtype=np.float32)  # tiles lie with the rows side by side
        debt = np.zeros((width, _TILE), dtype=np.float32)
        for row in range(count):
            for j in range(width):
                wanted[j, row], debt[j, row] = target[first + row, j], carried[first + row, j]
        own, wish = np.empty((width, _TILE), dtype=np.float32), np.empty((width, _TILE), dtype=np.float32)
        values = np.empty((width, _TILE), dtype=np.float32)
        scale, zero = np.ones(_TILE, dtype=np.float32), np.zeros(_TILE, dtype=np.float32)
        total = np.zeros(_TILE, dtype=np.float32)
        start = 0
        while start < width:
            group = groups[start]
            stop = start + 1
            while stop < width and groups[stop] == group:
                stop += 1
            for j in range(start, stop):
                _add_products(debt[j], columns[j], own, 0, start)
            if search:
                for j in range(start, stop):
                    pivot, sums = columns[j, j], np.zeros(_TILE, dtype=np.float32)
                    _add_products(sums, columns[j], wish, start, j)
                    for row in range(_TILE):
                        wish[j, row] = (debt[j, row] - sums[row]) / pivot
                        values[j, row] = wanted[j, row] + wish[j, row]
                _search(values, importance, start, stop, shrink, sym, top, middle, scale, zero)
                for row in range(count):
                    scales[first + row, group], zeros[first + row, group] = scale[row], np.int32(zero[row])
            else:
                for row in range(count):
                    scale[row], zero[row] = scales[first + row, group], np.float32(zeros[first + row, group])
            for j in range(start, stop):
                _add_products(debt[j], columns[j], own, start, j)
                pivot = columns[j, j]
                for row in range(_TILE):
                    code = np.rint((wanted[j, row] + debt[j, row] / pivot) / scale[row]) + zero[row]
                    code = min(max(code, np.float32(0)), top)
                    values[j, row] = code
                    own[j, row] = wanted[j, row] - (code - zero[row]) * scale[row]
                    left = debt[j, row] + pivot * own[j, row]
                    total[row] += left * left
            start = stop
        for row in range(count):
            loss[first + row] = total[row]
            for j in range(width):
                codes[first + row, j], error[first + row, j] = np.uint8(values[j, row]), own[j, row]


COMPILED = Kernels(find_scales, round_block)
