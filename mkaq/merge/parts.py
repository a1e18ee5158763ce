"""Where the attention heads and the MLP channels of a layer lie in its tensors.

A part is a KV group (a key/value head with the query heads that share it) or an MLP channel. It
owns rows of the linear layers that read the hidden state and columns of the one that writes it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mkaq.arch.arch import READ_BY_ATTENTION, READ_BY_MLP, Arch, Role
from mkaq.arch.config import Sizes
from mkaq.fit.select import columns_of

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


def attention_parts(arch: Arch, sizes: Sizes) -> Parts:
    """The KV groups of a layer."""
    query = sizes.heads // sizes.kv_heads * sizes.head_dim
    rows = {Role.QUERY: query, Role.KEY: sizes.head_dim, Role.VALUE: sizes.head_dim}
    readers = _spans(arch, {role: rows[role] for role in READ_BY_ATTENTION}, sizes.kv_heads)
    writer = arch.linear_of(Role.ATTENTION_OUTPUT).name
    return Parts(sizes.kv_heads, arch.attention_norm, readers, writer, query)


def mlp_parts(arch: Arch, sizes: Sizes) -> Parts:
    """The channels of a layer's MLP."""
    readers = _spans(arch, dict.fromkeys(READ_BY_MLP, 1), sizes.intermediate)
    return Parts(sizes.intermediate, arch.mlp_norm, readers, arch.linear_of(Role.DOWN).name, 1)


def _spans(arch: Arch, rows: Mapping[Role, int], count: int) -> Mapping[str, tuple[tuple[int, int], ...]]:
    """Where `count` parts lie in the linear layers that have some roles, with so many rows each."""
    found: dict[str, tuple[tuple[int, int], ...]] = {}
    for linear in arch.linears:
        start = 0
        for role in linear.roles:
            if role in rows:
                found[linear.name] = (*found.get(linear.name, ()), (start, rows[role]))
                start += count * rows[role]
    return found


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
