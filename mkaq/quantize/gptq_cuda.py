"""The inner loops of GPTQ for a GPU, compiled by Triton: one kernel per block instead of a dozen per column.

Import this only if Triton is installed, as it is with torch for CUDA; `works_on` says whether Triton can
compile for a device. Rows are independent, so a program takes a tile of rows and goes through the columns
with the errors in registers: it never reads what it wrote. The operations and their order are those of the
plain version, without contraction, except that sums add their terms in another order.
"""

import warnings
from collections.abc import Callable
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
import triton
import triton.language as tl

from mkaq.quantize.gptq import SHRINK, Kernels

_TILE = 4  # rows of a program, which is one warp: its sums need no synchronization
_WIDTH = 128  # columns of a tile
_OPTIONS = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": False}
_FAR = tl.constexpr(2.0**20)  # larger than every code
_WHOLE = tl.constexpr(1.5 * 2**23)  # floats of this size are integers: adding it rounds half to even
_TINY, _HUGE = tl.constexpr(2.0**-24), tl.constexpr(65504.0)


def _jit(function: Callable[..., Any]) -> Any:
    """triton.jit with one kernel for all sizes and alignments: only arguments in capitals specialize it."""
    names = [name for name in signature(function).parameters if name.islower()]
    return triton.jit(do_not_specialize=names, do_not_specialize_on_alignment=names)(function)


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
    """As `gptq.round_block`, for tensors on a GPU and blocks of at most 128 columns."""
    rows, width = target.shape
    codes = torch.empty(rows, width, dtype=torch.uint8, device=target.device)
    error = torch.empty(rows, width, device=target.device)
    loss = torch.empty(rows, device=target.device)
    with torch.cuda.device(target.get_device()):
        _round_rows[(triton.cdiv(rows, _TILE),)](
            target.contiguous(),
            carried.contiguous(),
            local.T.contiguous(),
            importance.contiguous(),
            scales,
            zeros,
            groups.contiguous(),
            _shrinks(target.device),
            codes,
            error,
            loss,
            rows,
            width,
            *scales.stride(),
            *zeros.stride(),
            len(SHRINK),
            float(2**bits - 1),
            float(2 ** (bits - 1)),
            SEARCH=search,
            SYM=sym,
            ROWS=_TILE,
            WIDTH=_padded(width),
            **_OPTIONS,
        )
    return codes, error, loss


def find_scales(
    weight: torch.Tensor, importance: torch.Tensor, bits: int, sym: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `gptq.find_scales`, for tensors on a GPU."""
    *shape, size = weight.shape
    grouped = weight.reshape(len(weight), -1, size).contiguous()
    rows, count, _ = grouped.shape
    scales = torch.empty(rows, count, device=weight.device)
    zeros = torch.empty(rows, count, dtype=torch.int32, device=weight.device)
    with torch.cuda.device(weight.get_device()):
        _search_rows[(triton.cdiv(rows, _TILE), count)](
            grouped,
            importance.reshape(-1, size).expand(count, size).contiguous(),
            _shrinks(weight.device),
            scales,
            zeros,
            rows,
            count,
            size,
            len(SHRINK),
            float(2**bits - 1),
            float(2 ** (bits - 1)),
            SYM=sym,
            ROWS=_TILE,
            WIDTH=_padded(min(size, _WIDTH)),
            **_OPTIONS,
        )
    return scales.reshape(shape), zeros.reshape(shape)


@lru_cache
def works_on(device: torch.device) -> bool:
    """Whether kernels can be compiled for a device and run there; this also needs a C compiler."""
    try:
        scales, _ = find_scales(torch.ones(1, 16, device=device), torch.ones(16, device=device), 4, True)
        return bool(scales.isfinite().all())
    except Exception as error:  # from Triton, a compiler or the driver
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        warnings.warn(f"GPTQ is slow on {device}: Triton cannot compile there ({reason})", stacklevel=2)
        return False


@lru_cache
def _shrinks(device: torch.device) -> torch.Tensor:
    return torch.tensor(SHRINK, dtype=torch.float32, device=device)


def _padded(width: int) -> int:
    return int(max(16, triton.next_power_of_2(width)))


@_jit
def _nearest(value: tl.tensor) -> tl.tensor:
    """The nearest integer, half to even; values beyond every code stay beyond."""
    clamped = tl.minimum(tl.maximum(value, -_FAR), _FAR)
    return (clamped + _WHOLE) - _WHOLE


@_jit
def _scale_and_zero(
    low: tl.tensor, high: tl.tensor, shrink: tl.tensor, top: tl.tensor, middle: tl.tensor, SYM: tl.constexpr
) -> tl.tuple:
    """The scale and zero point of a shrunk range, shape (rows,)."""
    scale = tl.math.div_rn((high - low) * shrink, top).to(tl.float16).to(tl.float32)
    scale = tl.minimum(tl.maximum(scale, _TINY), _HUGE)
    zero = tl.zeros_like(scale) + middle
    if not SYM:
        zero = tl.minimum(tl.maximum(_nearest(tl.math.div_rn(-low * shrink, scale)), 1.0), top)
    return scale, zero


@_jit
def _cost(
    values: tl.tensor, importances: tl.tensor, scale: tl.tensor, zero: tl.tensor, top: tl.tensor
) -> tl.tensor:
    """The cost of rounding each value of a tile to nearest."""
    code = _nearest(tl.math.div_rn(values, scale[:, None])) + zero[:, None]
    code = tl.minimum(tl.maximum(code, 0.0), top)
    difference = (code - zero[:, None]) * scale[:, None] - values
    return difference * difference * importances[None, :]


@_jit
def _search_rows(
    weight: tl.tensor,
    importance: tl.tensor,
    shrinks: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    rows: tl.tensor,
    count: tl.tensor,
    size: tl.tensor,
    steps: tl.tensor,
    top: tl.tensor,
    middle: tl.tensor,
    SYM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """`find_scales` for a tile of rows of one group."""
    row, group = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    row_mask = row < rows
    index = row.to(tl.int64) * count + group
    least, most = tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, size, WIDTH):
        column = start + tl.arange(0, WIDTH)
        mask = row_mask[:, None] & (column < size)[None, :]
        values = tl.load(weight + index[:, None] * size + column[None, :], mask=mask, other=0.0)
        least, most = tl.minimum(least, values), tl.maximum(most, values)
    low, high = tl.min(least, 1), tl.max(most, 1)
    if SYM:
        high = tl.maximum(-low, high)
        low = -high
    best = tl.full([ROWS], float("inf"), tl.float32)
    best_scale, best_zero = tl.full([ROWS], 1.0, tl.float32), tl.zeros([ROWS], tl.float32) + middle
    for step in range(0, steps):
        scale, zero = _scale_and_zero(low, high, tl.load(shrinks + step), top, middle, SYM)
        tile_cost = tl.zeros([ROWS, WIDTH], tl.float32)  # Triton fails at sums of sums here
        for start in range(0, size, WIDTH):
            column = start + tl.arange(0, WIDTH)
            mask = row_mask[:, None] & (column < size)[None, :]
            values = tl.load(weight + index[:, None] * size + column[None, :], mask=mask, other=0.0)
            importances = tl.load(importance + group * size + column, mask=column < size, other=0.0)
            tile_cost += _cost(values, importances, scale, zero, top)
        cost = tl.sum(tile_cost, 1)
        better = cost < best
        best = tl.where(better, cost, best)
        best_scale, best_zero = tl.where(better, scale, best_scale), tl.where(better, zero, best_zero)
    tl.store(scales + index, best_scale, mask=row_mask)
    tl.store(zeros + index, best_zero.to(tl.int32), mask=row_mask)


@_jit
def _round_rows(
    target: tl.tensor,
    carried: tl.tensor,
    columns: tl.tensor,
    importance: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    groups: tl.tensor,
    shrinks: tl.tensor,
    codes: tl.tensor,
    error: tl.tensor,
    loss: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    scale_row: tl.tensor,
    scale_group: tl.tensor,
    zero_row: tl.tensor,
    zero_group: tl.tensor,
    steps: tl.tensor,
    top: tl.tensor,
    middle: tl.tensor,
    SEARCH: tl.constexpr,
    SYM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """`round_block` for a tile of rows; row j of `columns` is column j of R within the block."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    row_mask, column_mask = row < rows, column < width
    row = row.to(tl.int64)
    offsets, mask = row[:, None] * width + column[None, :], row_mask[:, None] & column_mask[None, :]
    errors, rounded = tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    size = width
    if SEARCH:  # all groups of the block have one size and are contiguous
        number = tl.load(groups + column, mask=column_mask, other=-1)
        size = tl.sum((number == tl.load(groups)).to(tl.int32), 0)
    for start in range(0, width, size):
        scale, zero = tl.full([ROWS], 1.0, tl.float32), tl.zeros([ROWS], tl.float32)
        if SEARCH:
            shift = tl.zeros([ROWS, WIDTH], tl.float32)
            for j in range(start, start + size):
                factor = tl.load(columns + j * width + column, mask=column < j, other=0.0)
                correction = tl.load(carried + row * width + j, mask=row_mask, other=0.0)
                correction += tl.sum((errors - shift) * factor[None, :], 1)  # of disjoint columns
                column_shift = tl.math.div_rn(correction, tl.load(columns + j * width + j))
                shift = tl.where((column == j)[None, :], column_shift[:, None], shift)
            members = (column >= start) & (column < start + size)
            values = tl.load(target + offsets, mask=mask & members[None, :], other=0.0) + shift
            importances = tl.load(importance + column, mask=members, other=0.0)
            low, high = tl.minimum(tl.min(values, 1), 0.0), tl.maximum(tl.max(values, 1), 0.0)
            if SYM:
                high = tl.maximum(-low, high)
                low = -high
            best = tl.full([ROWS], float("inf"), tl.float32)
            scale, zero = tl.full([ROWS], 1.0, tl.float32), tl.zeros([ROWS], tl.float32) + middle
            for step in range(0, steps):
                new_scale, new_zero = _scale_and_zero(low, high, tl.load(shrinks + step), top, middle, SYM)
                cost = tl.sum(_cost(values, importances, new_scale, new_zero, top), 1)
                better = cost < best
                best = tl.where(better, cost, best)
                scale, zero = tl.where(better, new_scale, scale), tl.where(better, new_zero, zero)
            group = tl.load(groups + start)
            tl.store(scales + row * scale_row + group * scale_group, scale, mask=row_mask)
            tl.store(zeros + row * zero_row + group * zero_group, zero.to(tl.int32), mask=row_mask)
        for j in range(start, start + size):
            if not SEARCH:
                group = tl.load(groups + j)
                scale = tl.load(scales + row * scale_row + group * scale_group, mask=row_mask, other=1.0)
                stored_zero = tl.load(zeros + row * zero_row + group * zero_group, mask=row_mask, other=0)
                zero = stored_zero.to(tl.float32)
            factor = tl.load(columns + j * width + column, mask=column < j, other=0.0)
            pivot = tl.load(columns + j * width + j)
            weights = tl.load(target + row * width + j, mask=row_mask, other=0.0)
            correction = tl.load(carried + row * width + j, mask=row_mask, other=0.0)
            correction += tl.sum(errors * factor[None, :], 1)
            code = _nearest(tl.math.div_rn(weights + tl.math.div_rn(correction, pivot), scale)) + zero
            code = tl.minimum(tl.maximum(code, 0.0), top)
            column_error = weights - (code - zero) * scale
            residual = correction + pivot * column_error
            total += residual * residual
            errors = tl.where((column == j)[None, :], column_error[:, None], errors)
            rounded = tl.where((column == j)[None, :], code[:, None], rounded)
    tl.store(codes + offsets, rounded.to(tl.int32).to(tl.uint8), mask=mask)
    tl.store(error + offsets, errors, mask=mask)
    tl.store(loss + row, total, mask=row_mask)


FUSED = Kernels(find_scales, round_block)
