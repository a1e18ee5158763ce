"""Where a weight cannot be rounded as it should: columns without input, scales beyond float16."""

import torch

SMALLEST, LARGEST = 2.0**-24, 65504.0  # the positive numbers of float16


def dead_columns(weight: torch.Tensor, hessian: torch.Tensor) -> int:
    """The columns with weights whose input was 0 for every token: they are rounded to the nearest.

    Args:
        weight: Shape (out_features, in_features).
        hessian: X^T X of the inputs, shape (in_features, in_features).
    """
    dead = (hessian.diagonal() <= 0).to(weight.device)
    return int(weight[:, dead].ne(0).any(0).sum())


def clamped_scales(weight: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor) -> int:
    """The groups with weights whose scale is the smallest or the largest that float16 has.

    Args:
        weight: Shape (out_features, in_features).
        scales: Shape (out_features, groups).
        g_idx: The group of every column, shape (in_features,).
    """
    clamped = (scales <= SMALLEST) | (scales >= LARGEST)
    rows = clamped.any(1)
    if not bool(rows.any()):
        return 0
    largest = torch.zeros_like(scales[rows])
    sizes = weight[rows].abs().to(largest.dtype)
    largest.scatter_reduce_(1, g_idx.to(weight.device).long().expand(len(largest), -1), sizes, "amax")
    return int((clamped[rows] & (largest > 0)).sum())


def vanishing_rows(weight: torch.Tensor) -> int:
    """The rows with weights, all of them so small that float16 tells fewer of them apart than int8 does.

    bitsandbytes reads weights in float16 for int8: the smallest become 0.

    Args:
        weight: Shape (out_features, in_features).
    """
    largest = weight.abs().amax(1)
    return int(((largest > 0) & (largest < 127 * SMALLEST)).sum())
