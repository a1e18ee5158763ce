"""Averaging layers: theta = c theta_l + (1 - c) theta_m for every tensor of a layer (MKA eq. 9)."""

from collections.abc import Callable, Mapping, Sequence

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
    total = None
    for tensor, weight in zip(tensors, weights, strict=True):
        total = _added(total, tensor, weight)
    assert total is not None
    return total.to(dtype)


def merge_layers(
    layer_of: Callable[[int], Mapping[str, torch.Tensor]], weights: Mapping[int, float]
) -> dict[str, torch.Tensor]:
    """Averages whole layers, norms and biases included, as `weighted_sum` does; one is in memory at a time.

    Args:
        layer_of: Reads an old layer's tensors, by name below the layer.
        weights: For each old layer, its weight.
    """
    if list(weights.values()) == [1.0]:
        return dict(layer_of(*weights))
    totals, dtypes = dict[str, torch.Tensor](), dict[str, torch.dtype]()
    for index, weight in weights.items():
        for name, tensor in layer_of(index).items():
            totals[name] = _added(totals.get(name), tensor, weight)
            dtypes.setdefault(name, tensor.dtype)
    return {name: totals.pop(name).to(dtype) for name, dtype in dtypes.items()}


def _added(total: torch.Tensor | None, tensor: torch.Tensor, weight: float) -> torch.Tensor:
    term = tensor.float() * weight
    return term if total is None else total.add_(term)
