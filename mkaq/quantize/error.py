"""The error of a quantized weight."""

import torch


def relative_error(weight: torch.Tensor, quantized: torch.Tensor) -> float:
    """||W - Q||^2 / ||W||^2, summed in float64."""
    difference, whole = (
        torch.linalg.vector_norm(matrix, dtype=torch.float64).square().item()
        for matrix in (weight.float() - quantized.float(), weight)
    )
    return ratio(difference, whole)


def ratio(part: float, whole: float) -> float:
    """part / whole; 0 if rounding made the part negative, or if the whole is not positive."""
    return max(part, 0.0) / whole if whole > 0 else 0.0
