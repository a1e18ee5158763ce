"""The tensors of an artifact's layers that follow from the source and the record."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mkaq.arch.parts import attention_parts, mlp_parts
from mkaq.checkpoint.reader import Checkpoint
from mkaq.merge.averaged import merged_layers
from mkaq.merge.channels import known_tensors
from mkaq.merge.groups import MergePlan
from mkaq.merge.origins import Origins, as_tensor

if TYPE_CHECKING:
    from mkaq.stages.merge_parts import NewLayer


@dataclass(frozen=True)
class KnownLayer:
    """The tensors of a layer that can be recomputed.

    Attributes:
        tensors: Dense tensors by name below the layer.
        whole: Whether these are all tensors of the layer.
        sha256: The recorded digest of the whole layer, if there is one.
    """

    tensors: Mapping[str, torch.Tensor]
    whole: bool = True
    sha256: str | None = None


def untouched(source: Checkpoint, dtype: torch.dtype) -> Iterator[KnownLayer]:
    """Yields the source's own layers."""
    every = tuple({index: 1.0} for index in range(source.num_layers))
    yield from map(KnownLayer, merged_layers(source, MergePlan((), every), dtype))


def averaged(layers: Sequence["NewLayer"], source: Checkpoint, dtype: torch.dtype) -> Iterator[KnownLayer]:
    """Yields layers that are weighted sums of the source's layers."""
    plan = MergePlan((), tuple(layer.weights for layer in layers))
    for layer, tensors in zip(layers, merged_layers(source, plan, dtype), strict=True):
        yield KnownLayer(tensors, sha256=layer.sha256)


def fused(
    layers: Sequence["NewLayer"], origins: Sequence[Origins], source: Checkpoint, dtype: torch.dtype
) -> Iterator[KnownLayer]:
    """Yields layers made of the source's heads and channels, without the solved weights."""
    arch, sizes = source.arch, source.sizes
    kinds = {"heads": attention_parts(arch, sizes), "channels": mlp_parts(arch, sizes)}
    for layer, origin in zip(layers, origins, strict=True):
        group = sorted(layer.weights)
        tensors = [source.read_layer(index) for index in group]
        parts = []
        for name, kind in kinds.items():
            positions = as_tensor(origin[name])
            positions[:, 0] -= group[0]
            parts.append((kind, positions))
        assert layer.fused is not None
        unsolved = [solved.ridge is None for solved in (layer.fused.attention, layer.fused.mlp)]
        yield KnownLayer(known_tensors(tensors, parts, dtype, unsolved), whole=False, sha256=layer.sha256)
