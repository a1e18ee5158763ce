"""Which tensors a checkpoint is to have, and how they are shared out among its files."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from mkaq.checkpoint.reader import Checkpoint


class TensorSpec(NamedTuple):
    """Type and shape of a tensor that is to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Layout = Mapping[str, TensorSpec]


def fill_shards(layout: Layout, shard_size: int) -> list[dict[str, TensorSpec]]:
    """Splits tensors, in their order, into files of at most `shard_size` data bytes (or one tensor)."""
    shards: list[dict[str, TensorSpec]] = []
    room = 0
    for name, spec in layout.items():
        if not shards or spec.nbytes > room:
            shards.append({})
            room = shard_size
        shards[-1][name] = spec
        room -= spec.nbytes
    return shards


def layout_like(source: Checkpoint, layers: Iterable[int], dtype: torch.dtype) -> Layout:
    """The layout of a model with the outer tensors of `source` and with new layers.

    Args:
        source: Gives the shapes.
        layers: For each new layer, in order, the layer of `source` whose shapes it has.
        dtype: Of every tensor.
    """
    layout = {name: TensorSpec(dtype, source.tensors[name].shape) for name in source.outer_tensor_names}
    for new, old in enumerate(layers):
        for name in source.layer_tensor_names(old):
            below = name.removeprefix(f"{source.arch.layer_name(old)}.")
            layout[source.arch.in_layer(new, below)] = TensorSpec(dtype, source.tensors[name].shape)
    return layout
