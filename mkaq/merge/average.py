"""Averaging layers: theta = c theta_l + (1 - c) theta_m for every tensor of a layer (MKA eq. 9)."""

from collections.abc import Mapping, Sequence

import torch


def weighted_sum(
    tensors: Sequence[torch.Tensor], weights: Sequence[float], dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The weighted sum of tensors of one shape, in float32, cast once at the end.

    A single tensor of weight 1 is only cast. Terms are added in the given order, with one rounding per
    product and one per sum, so the same inputs give the same bits.

    Args:
        tensors: Tensors of one shape.
        weights: One weight per tensor.
        dtype: Type of the result; the first tensor's if None.
    """
    dtype = dtype or tensors[0].dtype
    if len(tensors) == 1 and weights[0] == 1.0:
        return tensors[0].to(dtype)
    total = tensors[0].float() * weights[0]
    term = torch.empty_like(total)
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total += term.copy_(tensor).mul_(weight)
    return total.to(dtype)


def merge_layers(
    layers: Mapping[int, Mapping[str, torch.Tensor]], weights: Mapping[int, float]
) -> dict[str, torch.Tensor]:
    """Averages whole layers, norms and biases included.

    Args:
        layers: For each old layer, its tensors by name below the layer.
        weights: For each old layer, its weight.
    """
    order = list(weights)
    return {
        name: weighted_sum([layers[index][name] for index in order], [weights[index] for index in order])
        for name in sorted(layers[order[0]])
    }
