"""Where the attention heads and the MLP channels of a layer lie in its tensors.

A part is a KV group (a key/value head with the query heads that share it) or an MLP channel. It
owns rows of the linear layers that read the hidden state and columns of the one that writes it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mkaq.fit.ridge import columns_of

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Parts:
    """One kind of parts of a decoder layer.

    Attributes:
        count: Parts of a layer.
        norm: The norm that the readers follow.
        readers: For each linear layer that reads, the spans (first row, rows per part) in it.
        writer: The linear layer that writes.
        width: Columns per part of the writer.
    """

    count: int
    norm: str
    readers: Mapping[str, tuple[tuple[int, int], ...]]
    writer: str
    width: int


def attention_parts(config: Any, linears: Sequence[str]) -> Parts:
    """The KV groups of a layer.

    Args:
        config: The configuration object of transformers.
        linears: The linear layers of the family.
    """
    groups = config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query = config.num_attention_heads // groups * size
    fused = "self_attn.qkv_proj" in linears
    readers: dict[str, tuple[tuple[int, int], ...]] = (
        {"self_attn.qkv_proj": ((0, query), (groups * query, size), (groups * (query + size), size))}
        if fused
        else {
            "self_attn.q_proj": ((0, query),),
            "self_attn.k_proj": ((0, size),),
            "self_attn.v_proj": ((0, size),),
        }
    )
    return Parts(groups, "input_layernorm", readers, "self_attn.o_proj", query)


def mlp_parts(config: Any, linears: Sequence[str]) -> Parts:
    """The channels of a layer's MLP."""
    channels = config.intermediate_size
    fused = "mlp.gate_up_proj" in linears
    readers: dict[str, tuple[tuple[int, int], ...]] = (
        {"mlp.gate_up_proj": ((0, 1), (channels, 1))}
        if fused
        else {"mlp.gate_proj": ((0, 1),), "mlp.up_proj": ((0, 1),)}
    )
    return Parts(channels, "post_attention_layernorm", readers, "mlp.down_proj", 1)


def fold_norm(tensors: Tensors, parts: Parts, kept: Tensors, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The readers of a layer, rewritten to follow another layer's norm: W diag(own norm / norm).

    Args:
        tensors: Of the layer, by their names below it.
        parts: Heads or channels.
        kept: The layer whose norm they are to follow.
        dtype: Of the result; the product is taken in float64.

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
    """The readers of a layer that is put together from parts of several.

    Args:
        layers: The readers of each layer, as `fold_norm` gives them.
        parts: Heads or channels.
        origins: For each new part its layer (a position in `layers`) and its number there, shape
            (count, 2).
    """
    result = {}
    for name, spans in parts.readers.items():
        rows = torch.cat(
            [
                (first + origins[:, 1:] * each + torch.arange(each)).reshape(-1)
                + (origins[:, :1] * layers[0][f"{name}.weight"].shape[0]).expand(-1, each).reshape(-1)
                for first, each in spans
            ]
        )
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in layers[0]:
                result[key] = torch.cat([layer[key] for layer in layers])[rows]
    return result


def take_columns(layers: Sequence[Tensors], parts: Parts, origins: torch.Tensor) -> torch.Tensor:
    """The columns of the layers' writers that belong to parts, shape (hidden_size, count * width)."""
    name = f"{parts.writer}.weight"
    return torch.cat([layer[name] for layer in layers], 1)[:, part_columns(parts, origins)]


def part_columns(parts: Parts, origins: torch.Tensor) -> torch.Tensor:
    """Where the columns of parts lie among those of all layers, side by side."""
    return columns_of(origins[:, 0] * parts.count + origins[:, 1], parts.width)


def all_parts(layers: int, parts: Parts) -> torch.Tensor:
    """Layer and number of every part of some layers, shape (layers * count, 2)."""
    return torch.cartesian_prod(torch.arange(layers), torch.arange(parts.count)).reshape(-1, 2)
