"""The stored tensors of a decoder layer, grouped by linear layer."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from mkaq.formats.formats import format_of

Tensors = dict[str, torch.Tensor]


def split_linears(
    tensors: Mapping[str, torch.Tensor], linears: Iterable[str]
) -> tuple[dict[str, Tensors], Tensors]:
    """The tensors of each linear layer by their names in it, and the remaining tensors.

    Args:
        tensors: The tensors of a decoder layer, by their names in the layer.
        linears: The names of its linear layers.
    """
    own: dict[str, Tensors] = {name: {} for name in linears}
    rest: Tensors = {}
    for name, tensor in tensors.items():
        linear = next((linear for linear in own if name.startswith(f"{linear}.")), None)
        if linear is None:
            rest[name] = tensor
        else:
            own[linear][name.removeprefix(f"{linear}.")] = tensor
    return own, rest


def dense_layer(
    tensors: Mapping[str, torch.Tensor], linears: Iterable[str], config: Mapping[str, Any] | None
) -> Tensors:
    """The tensors of a decoder layer with the weights of its linear layers made dense.

    Args:
        tensors: The stored tensors, by their names in the layer.
        linears: The names of its linear layers.
        config: The checkpoint's quantization_config.

    Raises:
        ValueError: If the tensors do not match one another (libraries may raise other errors).
    """
    own, result = split_linears(tensors, linears)
    for name, stored in own.items():
        result[f"{name}.weight"] = format_of(config).dequantize(stored, config or {})
        if "bias" in stored:
            result[f"{name}.bias"] = stored["bias"]
    return result
