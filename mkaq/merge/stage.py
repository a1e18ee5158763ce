"""The merge stage: compare the layers in one walk, plan, and write the smaller checkpoint."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save_file

from mkaq.errors import UnsupportedError, UsageError
from mkaq.merge.apply import merge_layers
from mkaq.merge.manifold import diffusion_map
from mkaq.merge.plan import MergePlan, plan_merge
from mkaq.merge.similarity import equal_frequency_cells, similarity_matrix
from mkaq.model.architecture import keep_layers
from mkaq.model.checkpoint import Checkpoint
from mkaq.model.walk import LayerWalk, return_freed_memory
from mkaq.model.writer import ShardWriter, tensor_bytes, write_json, write_side_files
from mkaq.progress import Progress
from mkaq.recipe import ManifoldSection, MergeSection


@dataclass(frozen=True)
class LayerSimilarity:
    """How alike the layers of a model are.

    Attributes:
        matrix: NPIB of every pair, shape (layers, layers).
        coordinates: Diffusion coordinates, shape (layers, points, dimensions).
    """

    matrix: npt.NDArray[np.float64]
    coordinates: npt.NDArray[np.float64]


def compare_layers(
    walk: LayerWalk, tokens: torch.Tensor, section: ManifoldSection, seed: int, progress: Progress
) -> LayerSimilarity:
    """Diffusion maps of every layer's output at the same token positions, and their NPIB.

    Args:
        walk: The model.
        tokens: Calibration token ids, shape (samples, length).
        section: Points, coordinates and bins.
        seed: Chooses the token positions.
        progress: Told of every layer.
    """
    length = tokens.shape[1]
    inner = np.flatnonzero(np.arange(tokens.numel()) % length)  # first tokens are unlike all others
    count = min(section.points, len(inner))
    chosen = np.sort(np.random.default_rng(seed).choice(inner, count, replace=False))
    samples = np.unique(chosen // length)
    rows = torch.from_numpy(np.searchsorted(samples, chosen // length) * length + chosen % length)
    bandwidth = None if section.bandwidth == "median" else float(section.bandwidth)
    maps = []
    walked = walk.hidden_states(tokens[torch.from_numpy(samples)])
    for index, hidden_states in progress.track(walked, "compare layers", walk.num_layers):
        states = hidden_states.reshape(-1, hidden_states.shape[-1])[rows.to(hidden_states.device)]
        points = states.float().cpu().numpy()
        try:
            maps.append(diffusion_map(points, section.dimensions, bandwidth, section.alpha, section.time))
        except ValueError as error:
            fix = "more calibration text, or another bandwidth"
            raise UsageError(
                f"layer {index} has no diffusion map: {error}", where="merge.manifold", fix=fix
            ) from None
    cells = [equal_frequency_cells(coordinates, section.bins) for coordinates in maps]
    return LayerSimilarity(similarity_matrix(cells, section.bias_correction), np.stack(maps))


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
) -> MergePlan:
    """Writes the merged checkpoint, merge_plan.json and similarity.safetensors.

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
    similarity = compare_layers(walk, tokens, section.manifold, seed, progress)
    plan = plan_merge(section, similarity.matrix)
    config = merged_config(source, plan, dtype)
    digests = []
    with ShardWriter(folder, shard_size) as writer:
        for name, tensor in source.each(source.outer_tensor_names):
            writer.add(name, cast(tensor, dtype, name))
        layers = merged_layers(source, plan, dtype)
        for new, tensors in enumerate(progress.track(layers, "merge", len(plan.layers))):
            digests.append(digest_layer(tensors))
            for name, tensor in tensors.items():
                writer.add(f"model.layers.{new}.{name}", tensor)
            return_freed_memory()
    write_json(folder / "config.json", config)
    write_side_files(source, folder)
    write_json(folder / "merge_plan.json", {**plan.as_json(), "layer_sha256": digests})
    save_file(
        {"npib": similarity.matrix, "coordinates": similarity.coordinates}, folder / "similarity.safetensors"
    )
    return plan


def merged_config(source: Checkpoint, plan: MergePlan, dtype: torch.dtype) -> dict[str, object]:
    """config.json of the merged checkpoint."""
    where = source.path / "config.json"
    config = keep_layers(source.config, source.hf_config.to_dict(), plan.kept, where)
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
