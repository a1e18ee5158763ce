"""Averaged layers, read and summed piece by piece."""

from collections.abc import Iterator, Mapping

import torch

from mkaq.checkpoint.output import cast
from mkaq.checkpoint.reader import Checkpoint
from mkaq.merge.average import weighted_sum
from mkaq.merge.groups import MergePlan
from mkaq.merge.write import NewLayer


def averaged_layers(source: Checkpoint, plan: MergePlan, dtype: torch.dtype) -> Iterator[NewLayer]:
    """Yields the averaged layers in order."""
    for weights in plan.layers:
        tensors = {
            name: averaged_blocks(source, name, weights, dtype) for name in names_below(source, min(weights))
        }
        yield NewLayer(tensors, {"from": {str(old): weight for old, weight in weights.items()}})


def merged_layers(
    source: Checkpoint, plan: MergePlan, dtype: torch.dtype
) -> Iterator[dict[str, torch.Tensor]]:
    """Yields the whole tensors of every averaged layer, by name below the layer."""
    for weights, layer in zip(plan.layers, averaged_layers(source, plan, dtype), strict=True):
        infos = {name: source.tensors[source.arch.in_layer(min(weights), name)] for name in layer.tensors}
        whole = {name: torch.cat(list(pieces)) for name, pieces in layer.tensors.items()}
        yield {name: tensor.reshape(infos[name].shape) for name, tensor in whole.items()}


def names_below(source: Checkpoint, layer: int) -> list[str]:
    """The names of a layer's tensors, below the layer."""
    prefix = f"{source.arch.layer_name(layer)}."
    return [name.removeprefix(prefix) for name in source.layer_tensor_names(layer)]


def averaged_blocks(
    source: Checkpoint, name: str, weights: Mapping[int, float], dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """Yields one tensor of an averaged layer, in pieces.

    The sum is taken in float32 and cast once; one piece of each old layer is in memory. A layer of weight 1
    is only cast.

    Args:
        source: The source checkpoint.
        name: The tensor's name below the layer.
        weights: For each old layer, its weight.
        dtype: Type of the result.
    """
    streams = [source.blocks(source.arch.in_layer(old, name)) for old in weights]
    for parts in zip(*streams, strict=True):
        yield cast(weighted_sum(parts, list(weights.values()), dtype), dtype, name)
