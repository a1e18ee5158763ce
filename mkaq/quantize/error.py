"""How far a quantized weight is from what it was."""

import torch


def relative_error(weight: torch.Tensor, quantized: torch.Tensor) -> float:
    """||W - Q||^2 / ||W||^2, summed in float64."""
    difference, whole = (
        torch.linalg.vector_norm(matrix, dtype=torch.float64).square().item()
        for matrix in (weight.float() - quantized.float(), weight)
    )
    return ratio(difference, whole)


def ratio(part: float, whole: float) -> float:
    """A share of a whole; rounding may not make it negative, and of nothing it is 0."""
    return max(part, 0.0) / whole if whole > 0 else 0.0
