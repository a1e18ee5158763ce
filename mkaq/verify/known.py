"""What every layer of an artifact must be, as far as it follows from the source and the record."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    from mkaq.stages.merge import NewLayer


@dataclass(frozen=True)
class KnownLayer:
    """The tensors of a layer that follow from what is known.

    Attributes:
        tensors: Dense, by their names below the layer.
        whole: Whether these are all.
        sha256: The recorded digest of the whole layer, if there is one.
    """

    tensors: Mapping[str, torch.Tensor]
    whole: bool = True
    sha256: str | None = None


def averaged(
    weights: Iterable[dict[int, float]], source: Checkpoint, dtype: torch.dtype
) -> Iterator[KnownLayer]:
    """Layers that are weighted sums of the source's."""
    for tensors in merged_layers(source, MergePlan((), tuple(weights)), dtype):
        yield KnownLayer(tensors)


def fused(
    layers: Sequence["NewLayer"], origins: Sequence[Origins], source: Checkpoint, dtype: torch.dtype
) -> Iterator[KnownLayer]:
    """Layers of heads and channels of the source's, without what was solved."""
    arch, sizes = source.arch, source.sizes
    kinds = {"heads": attention_parts(arch, sizes), "channels": mlp_parts(arch, sizes)}
    for layer, origin in zip(layers, origins, strict=True):
        group = sorted(layer.weights)
        tensors = [source.read_layer(index) for index in group]
        parts = []
        for name, kind in kinds.items():
            places = as_tensor(origin[name])
            places[:, 0] -= group[0]
            parts.append((kind, places))
        assert layer.fused is not None
        left = [solved.ridge is None for solved in (layer.fused.attention, layer.fused.mlp)]
        yield KnownLayer(known_tensors(tensors, parts, dtype, left), whole=False)
