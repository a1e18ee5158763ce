"""The GPTQ solver: rounding with error correction, as pure functions of a weight and a Hessian.

GPTQ (Frantar et al., arXiv 2210.17323) rounds the columns of W one after another so that
tr((W - Q) H (W - Q)^T) stays small, H = X^T X over calibration inputs. With the factorization H = R R^T, R
upper triangular, that error is the sum of squares of (W - Q) R. Rounding the columns greedily from first to
last is Babai's nearest plane algorithm (Chen et al., arXiv 2507.18553): column j is rounded after adding
correction / R_jj, correction = sum_{i<j} e_i R_ij, e = W - Q. Up to floating-point rounding this is GPTQ's
own sequence, with one Cholesky factorization and no inverse.

The scales of a group are found for its weights plus a shift that cancels the errors before the group:
shift R = correction, R within the group.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mkaq.fit.gram import factorize

SHRINK = tuple(1 - 0.025 * step for step in range(21))
_BLOCK = 128
_ROWS = 4096
_MAX_DAMP = 1.0


@dataclass(frozen=True)
class GptqResult:
    """A quantized weight.

    Attributes:
        codes: Integers in [0, 2**bits), shape (out_features, in_features), uint8.
        scales: Representable in float16, shape (out_features, groups), float32.
        zeros: Zero points in [1, 2**bits - 1], shape (out_features, groups), int32.
        g_idx: The group of every input feature, shape (in_features,).
        weight: scale * (code - zero), shape (out_features, in_features), float32.
        errors: (w - q) H (w - q)^T of every row, shape (out_features,).
        energies: w H w^T of every row, shape (out_features,).
        damp_percent: The damping with which the factorization succeeded.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    g_idx: torch.Tensor
    weight: torch.Tensor
    errors: torch.Tensor
    energies: torch.Tensor
    damp_percent: float


class Kernels(NamedTuple):
    """The inner loops: functions with the signatures of `find_scales` and `round_block`."""

    find_scales: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    round_block: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


class DampingError(ArithmeticError):
    """The Hessian is not positive definite even with a damping of 100 %."""


def reversed_factor(hessian: torch.Tensor, damp_percent: float) -> tuple[torch.Tensor, float]:
    """R of H + damping = R R^T with rows and columns reversed; the damping is raised until R exists.

    In reverse, R is lower triangular: the Cholesky factor of the reversed H, which is computed in place.

    Args:
        hessian: H, symmetric, shape (n, n), float32 or float64, with a positive diagonal.
        damp_percent: The fraction of the mean diagonal to add to the diagonal; raised tenfold at each
            failure, up to 1.

    Returns:
        R in reverse, and the damping used.

    Raises:
        DampingError: If R does not exist with any damping.
    """
    mean = hessian.diagonal().mean()
    while True:
        damped = hessian.flip(0, 1)
        damped.diagonal().add_(damp_percent * mean)
        factor = factorize(damped)
        if factor is not None and bool(torch.isfinite(factor.diagonal()).all()):
            return factor, damp_percent
        if damp_percent >= _MAX_DAMP:
            raise DampingError(
                f"not positive definite with a damping of {damp_percent:.0%} of its mean diagonal"
            )
        damp_percent = min(max(damp_percent * 10, 1e-4), _MAX_DAMP)


def find_scales(
    weight: torch.Tensor, importance: torch.Tensor, bits: int, sym: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and zero point of each row of a group, by search over a shrinking range.

    Args:
        weight: Shape (rows, group_size) or (rows, groups, group_size).
        importance: The cost of an error in a column (the Hessian's diagonal), shape (group_size,) or
            (groups, group_size).
        bits: Bits per code.
        sym: Whether the zero point is fixed to the middle, 2**(bits - 1).

    Returns:
        scales (float32, rounded to float16) and zeros (int32, from 1 to 2**bits - 1), both with the shape of
        `weight` without its last dimension.
    """
    top = 2**bits - 1
    low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
    if sym:
        high = torch.maximum(-low, high)
        low = -high
    best = torch.full_like(high, torch.inf)
    best_scale, best_zero = torch.ones_like(high), torch.full_like(high, 2 ** (bits - 1))
    for shrink in SHRINK:
        scale = _to_half((high - low) * shrink / top)
        zero = (
            torch.full_like(scale, 2 ** (bits - 1)) if sym else (-low * shrink / scale).round().clamp(1, top)
        )
        rounded = _round(weight, scale.unsqueeze(-1), zero.unsqueeze(-1), top)
        error = ((rounded - weight).square() * importance).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero.to(torch.int32)


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    sym: bool = True,
    desc_act: bool = False,
    static_groups: bool = False,
    damp_percent: float = 0.01,
    kernels: Kernels | None = None,
    fast: bool = False,
) -> GptqResult:
    """Quantizes a weight with a Hessian.

    Several layers with the same input can be solved together by stacking their rows: rows are independent,
    and the factorization is computed once.

    Args:
        weight: Shape (out_features, in_features).
        hessian: X^T X of the inputs, shape (in_features, in_features).
        bits: Bits per code.
        group_size: Columns that share a scale; -1 for all.
        sym: Whether codes are symmetric.
        desc_act: Whether columns are solved in order of descending Hessian diagonal.
        static_groups: Whether all scales are found before the first column is rounded, for groups of
            neighbouring columns. Otherwise a group is the next `group_size` columns in the order of solving,
            and its scale is found when it is reached.
        damp_percent: The initial damping.
        kernels: The inner loops; `PLAIN` if None.
        fast: Whether `energies` are computed in bfloat16, to about 0.1 %.

    Raises:
        ValueError: If `group_size` does not divide in_features.
        DampingError: If the Hessian cannot be factorized.
    """
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    if size < 1 or columns % size:
        raise ValueError(f"group_size {group_size} does not divide {columns} input features")
    device = weight.device
    search, round_columns = kernels or PLAIN
    importance = hessian.diagonal().float().clone()
    dead = importance <= 0
    importance[dead] = importance.mean().clamp(min=1e-8)
    hessian = hessian.float() if not dead.any() else _with_diagonal(hessian, importance)

    groups = torch.arange(columns, device=device) // size
    order, target = torch.arange(columns, device=device), weight.float()
    if desc_act:
        order = torch.argsort(importance, descending=True, stable=True)
        hessian, target = hessian[order][:, order], target[:, order]
    scales = torch.empty(rows, columns // size, device=device)
    zeros = torch.empty(rows, columns // size, dtype=torch.int32, device=device)
    if static_groups:
        grouped = weight.float().reshape(rows, -1, size)
        scales, zeros = search(grouped, importance.reshape(-1, size), bits, sym)
        groups = groups[order]
    importance = importance[order]

    factor, damp_percent = reversed_factor(hessian, damp_percent)
    added = torch.where(dead[order], importance, 0) + damp_percent * importance.mean()
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=device)
    error = torch.empty(rows, columns, device=device)
    loss = torch.zeros(rows, device=device)
    for block in _blocks(columns, size):
        start = block.start
        if not static_groups and start % size == 0 and size > _BLOCK:
            span, group = slice(start, start + size), start // size
            shift = torch.linalg.solve_triangular(
                _panel(factor, span, span), _carried(error, factor, span), upper=True, left=False
            )
            scales[:, group], zeros[:, group] = search(target[:, span] + shift, importance[span], bits, sym)
        codes[:, block], error[:, block], block_loss = round_columns(
            target[:, block],
            _carried(error, factor, block),
            _panel(factor, block, block),
            importance[block],
            scales,
            zeros,
            groups[block],
            search=not static_groups and size <= _BLOCK,
            bits=bits,
            sym=sym,
        )
        loss += block_loss
    loss -= error.square_() @ added  # the true H has no damping
    inverse = torch.argsort(order)
    codes, groups = (codes[:, inverse], groups[inverse]) if desc_act else (codes, groups)
    return GptqResult(
        codes=codes,
        scales=scales,
        zeros=zeros,
        g_idx=groups,
        weight=dequantize(codes, scales, zeros, groups, out=error),
        errors=loss.clamp_(min=0),
        energies=(_energies(target, factor, fast) - target.square() @ added).clamp_(min=0),
        damp_percent=damp_percent,
    )


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
    """Rounds a block of neighbouring columns, one after another.

    Args:
        target: The weights, shape (rows, width).
        carried: The correction from columns i before the block: sum e_i R_ij, shape (rows, width).
        local: R within the block, shape (width, width).
        importance: The cost of an error in a column, shape (width,).
        scales: Shape (rows, all groups).
        zeros: Of the same shape, int32.
        groups: The group of each column, shape (width,).
        search: Whether the scales and zeros of a group are found, in place, when its first column is reached;
            every group must then lie within the block.
        bits: Bits per code.
        sym: Whether codes are symmetric.

    Returns:
        codes (uint8) and error e = target - rounded, both of shape (rows, width), and the sum of squares of
        (W - Q) R over the block, shape (rows,).
    """
    top = 2**bits - 1
    target, carried = target.T.contiguous(), carried.T.contiguous()  # a column of W is a row here
    error, codes = torch.empty_like(target), torch.empty_like(target, dtype=torch.uint8)
    loss = torch.zeros(target.shape[1], device=target.device)
    numbers = groups.tolist()
    for column, group in enumerate(numbers):
        if search and (column == 0 or group != numbers[column - 1]):
            members = slice(column, column + numbers.count(group))
            correction = carried[members] + local[:column, members].T @ error[:column]
            shift = torch.linalg.solve_triangular(local[members, members].T, correction, upper=False)
            scales[:, group], zeros[:, group] = find_scales(
                (target[members] + shift).T, importance[members], bits, sym
            )
        scale, zero = scales[:, group], zeros[:, group].float()
        correction, pivot = carried[column] + local[:column, column] @ error[:column], local[column, column]
        code = ((target[column] + correction / pivot) / scale).round_().add_(zero).clamp_(0, top)
        codes[column] = code
        error[column] = target[column] - (code - zero) * scale
        loss += (correction + pivot * error[column]).square_()
    return codes.T, error.T, loss


def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    g_idx: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """scale * (code - zero), float32; shapes as in `GptqResult`."""
    out = torch.empty(codes.shape, device=codes.device) if out is None else out
    for start in range(0, len(codes), _ROWS):
        part = slice(start, start + _ROWS)
        torch.sub(codes[part], zeros[part][:, g_idx], out=out[part]).mul_(scales[part][:, g_idx])
    return out


PLAIN = Kernels(find_scales, round_block)


def _blocks(columns: int, size: int) -> Iterator[slice]:
    """Blocks of about `_BLOCK` columns that consist of whole groups or lie within one."""
    unit = size if size > _BLOCK else _BLOCK // size * size
    for start in range(0, columns, unit):
        stop = min(start + unit, columns)
        yield from (slice(at, min(at + _BLOCK, stop)) for at in range(start, stop, _BLOCK))


def _panel(factor: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
    """A part of R, given R in reverse."""
    end = len(factor)
    return factor[end - rows.stop : end - rows.start, end - columns.stop : end - columns.start].flip(0, 1)


def _carried(error: torch.Tensor, factor: torch.Tensor, block: slice) -> torch.Tensor:
    """The correction of a block from the columns before it: sum e_i R_ij."""
    before = slice(0, block.start)
    return error[:, before] @ _panel(factor, before, block)


def _energies(weight: torch.Tensor, factor: torch.Tensor, fast: bool) -> torch.Tensor:
    """The sum of squares of W R for each row."""
    dtype = torch.bfloat16 if fast else torch.float32
    low, total = weight.to(dtype), torch.zeros(len(weight), device=weight.device)
    for start in range(0, len(factor), _ROWS):
        block = slice(start, min(start + _ROWS, len(factor)))
        panel = _panel(factor, slice(0, block.stop), block).to(dtype)
        for part in range(0, len(weight), _ROWS):
            rows = slice(part, part + _ROWS)
            total[rows] += (low[rows, : block.stop] @ panel).float().square_().sum(1)
    return total


def _with_diagonal(hessian: torch.Tensor, diagonal: torch.Tensor) -> torch.Tensor:
    hessian = hessian.float().clone()
    hessian.diagonal().copy_(diagonal)
    return hessian


def _round(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int) -> torch.Tensor:
    """Rounds each weight to the nearest value that a code represents."""
    return ((weight / scale).round_().add_(zero).clamp_(0, top) - zero) * scale


def _to_half(scale: torch.Tensor) -> torch.Tensor:
    """The nearest float16, never zero or infinite: the format stores scales in float16."""
    return scale.to(torch.float16).float().clamp(min=2.0**-24, max=65504)
