"""The tensors that a checkpoint will have, and how they are split into shards."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from mkaq.checkpoint.reader import Checkpoint


class TensorSpec(NamedTuple):
    """Dtype and shape of a tensor to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The size of its data in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Layout = Mapping[str, TensorSpec]


def fill_shards(layout: Layout, shard_size: int) -> list[dict[str, TensorSpec]]:
    """Splits tensors, in order, into shards of at most `shard_size` bytes; a larger tensor gets its own."""
    shards: list[dict[str, TensorSpec]] = []
    free = 0
    for name, spec in layout.items():
        if not shards or spec.nbytes > free:
            shards.append({})
            free = shard_size
        shards[-1][name] = spec
        free -= spec.nbytes
    return shards


def layout_like(source: Checkpoint, layers: Iterable[int], dtype: torch.dtype) -> Layout:
    """The layout of a model with the outer tensors of `source` and with new layers.

    Args:
        source: The checkpoint that gives the shapes.
        layers: For each new layer, in order, the layer of `source` whose shapes it has.
        dtype: The dtype of every tensor.
    """
    layout = {name: TensorSpec(dtype, source.tensors[name].shape) for name in source.outer_tensor_names}
    for new, old in enumerate(layers):
        for name in source.layer_tensor_names(old):
            relative = name.removeprefix(f"{source.arch.layer_name(old)}.")
            layout[source.arch.in_layer(new, relative)] = TensorSpec(dtype, source.tensors[name].shape)
    return layout
