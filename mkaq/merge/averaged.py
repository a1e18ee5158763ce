"""The layers of an average, read and summed piece by piece."""

from collections.abc import Iterator, Mapping

import torch

from mkaq.checkpoint.output import cast
from mkaq.checkpoint.reader import Checkpoint
from mkaq.merge.average import weighted_sum
from mkaq.merge.groups import MergePlan
from mkaq.merge.write import NewLayer


def averaged_layers(source: Checkpoint, plan: MergePlan, dtype: torch.dtype) -> Iterator[NewLayer]:
    """The new layers of an average, in turn."""
    for weights in plan.layers:
        tensors = {
            name: averaged_blocks(source, name, weights, dtype) for name in names_below(source, min(weights))
        }
        yield NewLayer(tensors, {"from": {str(old): weight for old, weight in weights.items()}})


def merged_layers(
    source: Checkpoint, plan: MergePlan, dtype: torch.dtype
) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of every new layer of an average in turn, whole, by their names below the layer."""
    for weights, layer in zip(plan.layers, averaged_layers(source, plan, dtype), strict=True):
        infos = {name: source.tensors[source.arch.in_layer(min(weights), name)] for name in layer.tensors}
        whole = {name: torch.cat(list(pieces)) for name, pieces in layer.tensors.items()}
        yield {name: tensor.reshape(infos[name].shape) for name, tensor in whole.items()}


def names_below(source: Checkpoint, layer: int) -> list[str]:
    """The names of the tensors of a layer, below it."""
    prefix = f"{source.arch.layer_name(layer)}."
    return [name.removeprefix(prefix) for name in source.layer_tensor_names(layer)]


def averaged_blocks(
    source: Checkpoint, name: str, weights: Mapping[int, float], dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """One tensor of a new layer, in pieces.

    The sum is taken in float32 and cast once, to the checkpoint's type; one piece of each old layer is
    in memory. A lone layer is handed on as it is.

    Args:
        source: The checkpoint that is merged.
        name: Below the layer.
        weights: For each old layer its weight.
        dtype: Of the result.
    """
    streams = [source.blocks(source.arch.in_layer(old, name)) for old in weights]
    for parts in zip(*streams, strict=True):
        yield cast(weighted_sum(parts, list(weights.values()), dtype), dtype, name)
