"""The merge stage: choose the groups of layers, make one layer of each, write the smaller checkpoint."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import save_file

from mkaq.calibrate.tokens import with_copies
from mkaq.errors import UnsupportedError
from mkaq.handoff import digest_of
from mkaq.merge.apply import merge_layers
from mkaq.merge.choose import choose_groups
from mkaq.merge.fuse import check_fusable, fuse
from mkaq.merge.least_squares import Fit
from mkaq.merge.origins import ORIGINS, Origins, origins_of, shares, write_origins
from mkaq.merge.plan import MergePlan
from mkaq.model.architecture import keep_layers
from mkaq.model.checkpoint import Checkpoint
from mkaq.model.walk import LayerWalk, return_freed_memory
from mkaq.model.writer import ShardWriter, tensor_bytes, write_json, write_side_files
from mkaq.progress import Progress
from mkaq.recipe import MergeSection


def merge(
    source: Checkpoint,
    tokens: torch.Tensor,
    section: MergeSection,
    seed: int,
    folder: Path,
    *,
    walk: LayerWalk,
    dtype: torch.dtype,
    shard_size: int,
    progress: Progress,
) -> None:
    """Writes the merged checkpoint, merge_plan.json and what led to it.

    Args:
        source: The checkpoint to merge.
        tokens: Calibration token ids.
        section: The recipe's merge section.
        seed: Chooses the token positions.
        folder: Where it all goes.
        walk: A walk over `source`.
        dtype: Of the merged checkpoint.
        shard_size: Bytes per file.
        progress: Told of every layer.
    """
    if section.fuse == "channels":
        check_fusable(source, len(tokens))
    choice = choose_groups(walk, tokens, section, seed, dtype, progress)
    if section.fuse == "channels":
        made = fused_layers(walk, with_copies(tokens, seed), choice.plan.groups, dtype)
        merges = []
    else:
        made = averaged_layers(source, choice.plan, dtype)
        merges = choice.plan.as_json()["merges"]
    rows: list[dict[str, Any]] = []
    origins: list[Origins] = []
    with ShardWriter(folder, shard_size) as writer:
        for name, tensor in source.each(source.outer_tensor_names):
            writer.add(name, cast(tensor, dtype, name))
        for layer in progress.track(made, "merge", len(choice.plan.layers)):
            rows.append({"new": len(rows), **layer.record, "sha256": digest_layer(layer.tensors)})
            origins += [layer.origins] if layer.origins else []
            for name, tensor in layer.tensors.items():
                writer.add(f"model.layers.{rows[-1]['new']}.{name}", tensor)
            return_freed_memory()
    write_json(folder / "config.json", merged_config(source, choice.plan.kept, dtype))
    write_side_files(source, folder)
    if origins:
        write_origins(folder / ORIGINS, origins)
    measured = [{"first": k, "layers": n, "error": error} for (k, n), error in choice.errors.items()]
    write_json(folder / "merge_plan.json", {"merges": merges, "measured": measured, "layers": rows})
    if choice.similarity is not None:
        arrays = {"npib": choice.similarity.matrix, "coordinates": choice.similarity.coordinates}
        save_file(arrays, folder / "similarity.safetensors")


@dataclass(frozen=True)
class NewLayer:
    """A layer of the merged model.

    Attributes:
        tensors: By their names below the layer.
        record: What the plan says of it: `from`, the share of each old layer, and how it was fused.
        origins: Which head and channel came from where, if it was fused.
    """

    tensors: dict[str, torch.Tensor]
    record: dict[str, Any]
    origins: Origins | None = None


def averaged_layers(source: Checkpoint, plan: MergePlan, dtype: torch.dtype) -> Iterator[NewLayer]:
    """The new layers of an average, in turn."""
    for weights, tensors in zip(plan.layers, merged_layers(source, plan, dtype), strict=True):
        yield NewLayer(tensors, {"from": {str(old): weight for old, weight in weights.items()}})


def fused_layers(
    walk: LayerWalk, tokens: torch.Tensor, groups: Sequence[Sequence[int]], dtype: torch.dtype
) -> Iterator[NewLayer]:
    """The new layers of a fusion, in turn, each solved on what those before it hand on."""
    original = walk.embed(tokens)
    compressed = original.clone()
    for group in groups:
        layer = fuse(walk, group, original, compressed, dtype)
        for name, tensor in layer.tensors.items():
            cast(tensor, dtype, name)
        origins = origins_of(layer)
        record = {
            "origins_sha256": digest_of(origins),
            "attention": _solved(layer.attention),
            "mlp": _solved(layer.mlp),
            "residual": layer.residual,
        }
        share = {str(old): share for old, share in shares(layer).items()}
        yield NewLayer(layer.tensors, {"from": share, "fused": record}, origins)


def _solved(fit: Fit) -> dict[str, float | None]:
    return {"ridge": fit.ridge, "error_before": fit.error_before, "error": fit.error}


def merged_config(source: Checkpoint, kept: Sequence[int], dtype: torch.dtype) -> dict[str, object]:
    """config.json of the merged checkpoint, whose layers take the places `kept`."""
    where = source.path / "config.json"
    config = keep_layers(source.config, source.hf_config.to_dict(), kept, where)
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    return config


def merged_layers(
    source: Checkpoint, plan: MergePlan, dtype: torch.dtype
) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of every new layer in turn, by their names below the layer.

    The sum is taken in float32 and cast once, to the checkpoint's type; only the layers of one
    group are in memory.
    """
    for weights in plan.layers:
        group = {}
        for old in weights:
            prefix = f"model.layers.{old}."
            tensors = source.read(source.layer_tensor_names(old))
            group[old] = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        lone = len(group) == 1
        if not lone:
            group = {
                old: {name: tensor.float() for name, tensor in layer.items()} for old, layer in group.items()
            }
        yield {name: cast(tensor, dtype, name) for name, tensor in merge_layers(group, weights).items()}


def cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """A tensor in another type.

    Raises:
        UnsupportedError: If its values do not fit the type.
    """
    result = tensor.to(dtype)
    if dtype == torch.float16 and not bool(torch.isfinite(result).all()):
        raise UnsupportedError(
            f"{name} has values beyond float16", where="model.dtype", fix="use bfloat16 or auto"
        )
    return result


def digest_layer(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over the names and bytes of a layer's tensors, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0")
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()
