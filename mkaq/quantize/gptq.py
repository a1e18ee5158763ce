"""The GPTQ solver: rounding that corrects itself, as pure functions of a weight and a Hessian.

GPTQ (Frantar et al., arXiv 2210.17323) rounds the columns of W one after another so that
tr((W - Q) H (W - Q)^T) stays small, H = X^T X over calibration inputs. With the factorization
H = R R^T, R upper triangular, that error is the sum of squares of (W - Q) R, and choosing the
columns greedily from the first to the last is Babai's nearest plane algorithm (Chen et al.,
arXiv 2507.18553): column j is rounded after adding  sum_{i<j} e_i R_ij / R_jj,  e = W - Q. This
is GPTQ's own sequence, to rounding, with one Cholesky factorization and no inverse.
"""

from dataclasses import dataclass

import torch

_SHRINK = tuple(1 - 0.025 * step for step in range(21))
_BLOCK = 128
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
        errors: (w - q) H (w - q)^T of every row, H damped, shape (out_features,).
        damp_percent: The damping that made the factorization succeed.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    g_idx: torch.Tensor
    weight: torch.Tensor
    errors: torch.Tensor
    damp_percent: float


class DampingError(ArithmeticError):
    """No damping up to 100 % made the Hessian positive definite."""


def upper_factor(hessian: torch.Tensor, damp_percent: float) -> tuple[torch.Tensor, float]:
    """R upper triangular with R R^T = H + damping, the damping raised until it exists.

    Args:
        hessian: Symmetric, shape (n, n), float32 or float64, with a positive diagonal.
        damp_percent: Share of the mean diagonal to add to the diagonal; raised tenfold at each
            failure, up to 100 %.

    Returns:
        R, and the damping used.

    Raises:
        DampingError: If there is none.
    """
    mean = hessian.diagonal().mean()
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(damp_percent * mean)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed) and bool(torch.isfinite(lower.diagonal()).all()):
            return lower.flip(0, 1), damp_percent
        if damp_percent >= _MAX_DAMP:
            raise DampingError(
                f"not positive definite with a damping of {damp_percent:.0%} of its mean diagonal"
            )
        damp_percent = min(max(damp_percent * 10, 1e-4), _MAX_DAMP)


def find_scales(
    weight: torch.Tensor, importance: torch.Tensor, bits: int, sym: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each row of a group, by search over a shrinking range.

    Args:
        weight: Shape (rows, group_size) or (rows, groups, group_size).
        importance: What an error of a column costs (the Hessian's diagonal), shape (group_size,)
            or (groups, group_size).
        bits: Bits per code.
        sym: Fix the zero point to the middle, 2**(bits - 1).

    Returns:
        scales (float32, rounded to float16) and zeros (int32, from 1 to 2**bits - 1), each of the
        shape of `weight` without its last dimension.
    """
    top = 2**bits - 1
    low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
    if sym:
        high = torch.maximum(-low, high)
        low = -high
    best = torch.full_like(high, torch.inf)
    best_scale, best_zero = torch.ones_like(high), torch.full_like(high, 2 ** (bits - 1))
    for shrink in _SHRINK:
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
) -> GptqResult:
    """Quantizes a weight against a Hessian.

    Several layers with the same input are solved at once by stacking their rows: rows do not
    influence one another, and the factorization is made once.

    Args:
        weight: Shape (out_features, in_features).
        hessian: X^T X of the inputs, shape (in_features, in_features).
        bits: Bits per code.
        group_size: Columns that share a scale; -1 means all.
        sym: Symmetric codes.
        desc_act: Take the columns in order of falling Hessian diagonal.
        static_groups: Find all scales before the first column is rounded, from groups of
            neighbouring columns; otherwise a group is the next `group_size` columns of the order
            in which they are taken, and its scale is found when it is reached.
        damp_percent: Damping to begin with.

    Raises:
        ValueError: If `group_size` does not divide in_features.
        DampingError: If the Hessian cannot be factorized.
    """
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    if size < 1 or columns % size:
        raise ValueError(f"group_size {group_size} does not divide {columns} input features")
    top = 2**bits - 1
    hessian = hessian.to(torch.float32).clone()
    dead = hessian.diagonal() <= 0
    hessian.diagonal()[dead] = hessian.diagonal().mean().clamp(min=1e-8)
    importance = hessian.diagonal().clone()

    order = (
        torch.argsort(importance, descending=True, stable=True)
        if desc_act
        else torch.arange(columns, device=weight.device)
    )
    group_of = torch.arange(columns, device=weight.device) // size
    scales = torch.empty(rows, columns // size, device=weight.device)
    zeros = torch.empty(rows, columns // size, dtype=torch.int32, device=weight.device)
    if static_groups:
        grouped = weight.float().reshape(rows, -1, size)
        scales, zeros = find_scales(grouped, importance.reshape(-1, size), bits, sym)
        group_of = group_of[order]

    factor, damp_percent = upper_factor(hessian[order][:, order], damp_percent)
    importance = importance[order]
    target = weight.float()[:, order].T.contiguous()  # (in, out): a column of W is a row here
    solved = torch.empty_like(target)
    codes = torch.empty_like(target, dtype=torch.uint8)
    error = torch.empty_like(target)
    loss = torch.zeros(rows, device=weight.device)
    step = _BLOCK if static_groups else min(size, columns)
    for start in range(0, columns, step):
        block = slice(start, min(start + step, columns))
        local = factor[block, block]
        carried = factor[:start, block].T @ error[:start]  # what earlier columns ask of this block
        if not static_groups:
            wish = torch.linalg.solve_triangular(local.T, carried, upper=False)
            group = start // size
            found = find_scales((target[block] + wish).T, importance[block], bits, sym)
            scales[:, group], zeros[:, group] = found
        scale, zero = scales.T[group_of[block]], zeros.T[group_of[block]].float()
        for offset in range(block.stop - start):
            column, pivot = start + offset, local[offset, offset]
            debt = carried[offset] + local[:offset, offset] @ error[start:column]
            code = (
                ((target[column] + debt / pivot) / scale[offset]).round_().add_(zero[offset]).clamp_(0, top)
            )
            codes[column] = code
            solved[column] = (code - zero[offset]) * scale[offset]
            error[column] = target[column] - solved[column]
            loss += (debt + pivot * error[column]).square_()
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(columns, device=order.device)
    return GptqResult(
        codes=codes.T[:, inverse].contiguous(),
        scales=scales,
        zeros=zeros,
        g_idx=group_of[inverse],
        weight=solved.T[:, inverse].contiguous(),
        errors=loss,
        damp_percent=damp_percent,
    )


def _round(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int) -> torch.Tensor:
    """Rounding to nearest: the value that stands for each weight."""
    return ((weight / scale).round_().add_(zero).clamp_(0, top) - zero) * scale


def _to_half(scale: torch.Tensor) -> torch.Tensor:
    """Rounded to what float16 holds, and never zero: the format stores scales in float16."""
    return scale.to(torch.float16).float().clamp(min=2.0**-24, max=65504)
