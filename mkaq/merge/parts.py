"""Assembling one layer from the heads and channels of several."""

from collections.abc import Mapping, Sequence

import torch

from mkaq.arch.parts import Parts
from mkaq.fit.select import columns_of

Tensors = Mapping[str, torch.Tensor]


def fold_norm(tensors: Tensors, parts: Parts, kept: Tensors, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The readers of a layer, rewritten to follow another layer's norm: W diag(own norm / kept norm).

    Args:
        tensors: The layer's tensors by name below the layer.
        parts: Heads or channels.
        kept: Tensors of the layer whose norm is kept.
        dtype: Type of the result; the product is taken in float64.

    Returns:
        Weights and biases of the readers.
    """
    own, other = (layer[f"{parts.norm}.weight"].double() for layer in (tensors, kept))
    ratio = torch.where(other == 0, torch.zeros_like(own), own / other)
    result = {}
    for name in parts.readers:
        weight = tensors[f"{name}.weight"]
        same = bool((ratio == 1).all())
        result[f"{name}.weight"] = (weight if same else weight.double() * ratio).to(dtype)
        if f"{name}.bias" in tensors:
            result[f"{name}.bias"] = tensors[f"{name}.bias"].to(dtype)
    return result


def take_parts(layers: Sequence[Tensors], parts: Parts, origins: torch.Tensor) -> dict[str, torch.Tensor]:
    """The readers of a layer assembled from parts of several layers.

    Args:
        layers: The readers of each layer, as `fold_norm` returns them.
        parts: Heads or channels.
        origins: For each new part, its layer (position in `layers`) and its number in that layer, shape
            (count, 2).
    """
    result = {}
    for name, spans in parts.readers.items():
        rows = torch.cat(
            [
                (first + origins[:, 1:] * size + torch.arange(size)).reshape(-1)
                + (origins[:, :1] * layers[0][f"{name}.weight"].shape[0]).expand(-1, size).reshape(-1)
                for first, size in spans
            ]
        )
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in layers[0]:
                result[key] = torch.cat([layer[key] for layer in layers])[rows]
    return result


def take_columns(layers: Sequence[Tensors], parts: Parts, origins: torch.Tensor) -> torch.Tensor:
    """The writers' columns that belong to the given parts, shape (hidden_size, count * width)."""
    name = f"{parts.writer}.weight"
    return torch.cat([layer[name] for layer in layers], 1)[:, part_columns(parts, origins)]


def part_columns(parts: Parts, origins: torch.Tensor) -> torch.Tensor:
    """The columns of parts, where the columns of all layers lie side by side."""
    return columns_of(origins[:, 0] * parts.count + origins[:, 1], parts.width)


def all_parts(layers: int, parts: Parts) -> torch.Tensor:
    """Layer and number of every part of `layers` layers, shape (layers * count, 2)."""
    return torch.cartesian_prod(torch.arange(layers), torch.arange(parts.count)).reshape(-1, 2)
