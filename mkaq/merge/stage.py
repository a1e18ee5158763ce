"""The merge stage: choose the groups of layers, make one layer of each, write the smaller checkpoint."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import save_file

from mkaq.arch.arch import Arch
from mkaq.arch.config import keep_layers
from mkaq.checkpoint.reader import Checkpoint
from mkaq.checkpoint.writer import Writer, checksum_of, layout_like, write_side_files, writer_of
from mkaq.digests import digest_of
from mkaq.errors import UnsupportedError
from mkaq.files import write_json
from mkaq.fit.final_norm import Rescaled, rescale, rescaled
from mkaq.fit.hold_out import Samples, learning_samples
from mkaq.fit.ridge import Fit
from mkaq.heap import return_freed_memory
from mkaq.merge.average import weighted_sum
from mkaq.merge.channels import fuse, pass_fused
from mkaq.merge.choose import choose_groups
from mkaq.merge.groups import MergePlan
from mkaq.merge.origins import ORIGINS, Origins, origins_of, shares, write_origins
from mkaq.progress import Progress
from mkaq.ranks import ALONE, Ranks
from mkaq.recipe import MergeSection
from mkaq.walk.walk import LayerWalk


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
) -> dict[str, str]:
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

    Returns:
        sha256 of the weight files by name.
    """
    choice = choose_groups(walk, tokens, section, seed, dtype, progress)
    plan = choice.plan
    final_norm: Callable[[], Rescaled] | None = None
    if section.fuse == "channels":
        streams = Streams.of(walk, learning_samples(walk.ranks, tokens, seed))
        made, merges, final_norm = fused_layers(streams, plan.groups, dtype), [], streams.rescale
    else:
        made, merges = averaged_layers(source, plan, dtype), plan.as_json()["merges"]
    layers = progress.track(made, "merge", len(plan.layers))
    written = write_merged(
        source, layers, plan.kept, folder, dtype, shard_size, walk.ranks, final_norm=final_norm
    )
    if written.origins:
        write_origins(folder / ORIGINS, written.origins)
    told = {
        "merges": merges,
        "measured": [{"first": k, "layers": n, "error": error} for (k, n), error in choice.errors.items()],
        "layers": written.rows,
        "final_norm": written.final_norm and asdict(written.final_norm),
    }
    write_json(folder / "merge_plan.json", told)
    if choice.similarity is not None:
        arrays = {"npib": choice.similarity.matrix, "coordinates": choice.similarity.coordinates}
        save_file(arrays, folder / "similarity.safetensors")
    return written.digests


@dataclass(frozen=True)
class NewLayer:
    """A layer of the merged model.

    Attributes:
        tensors: By their names below the layer, each in pieces: flat, in order.
        record: What the plan says of it: `from`, the share of each old layer, and how it was fused.
        origins: Which head and channel came from where, if it was fused.
    """

    tensors: Mapping[str, Iterable[torch.Tensor]]
    record: dict[str, Any]
    origins: Origins | None = None


@dataclass(frozen=True)
class Streams:
    """What the source and the fused model give for the same tokens, up to where both have been walked.

    Attributes:
        walk: Over the source.
        original: Hidden states of the source, shape (samples, length, hidden_size).
        compressed: Those of the fused model, of the same shape.
        samples: Which ones are held out.
    """

    walk: LayerWalk
    original: torch.Tensor
    compressed: torch.Tensor
    samples: Samples

    @classmethod
    def of(cls, walk: LayerWalk, samples: Samples) -> "Streams":
        """Both before the first layer."""
        embedded = walk.embed(samples.tokens)
        return cls(walk, embedded, walk.activations.copy(embedded), samples)

    def rescale(self) -> Rescaled:
        """The factor of the fused model's final norm, once both are past the last layer."""
        return rescale(self.walk, self.walk, self.original, self.compressed, self.samples)


@dataclass(frozen=True)
class Written:
    """What `write_merged` has to tell.

    Attributes:
        rows: Of merge_plan.json, one for each layer.
        origins: Of fused layers.
        final_norm: How the final norm was rescaled, if it was.
        digests: sha256 of the weight files by name.
    """

    rows: list[dict[str, Any]]
    origins: list[Origins]
    final_norm: Rescaled | None
    digests: dict[str, str]


def write_merged(
    source: Checkpoint,
    layers: Iterable[NewLayer],
    kept: Sequence[int],
    folder: Path,
    dtype: torch.dtype,
    shard_size: int,
    ranks: Ranks = ALONE,
    final_norm: Callable[[], Rescaled] | None = None,
) -> Written:
    """Writes the merged checkpoint: the outer tensors of the source, and new layers.

    Args:
        source: The checkpoint that is merged.
        layers: The new layers, in turn.
        kept: For each new layer the old layer whose place in the configuration it takes.
        folder: Where the checkpoint goes.
        dtype: Of its tensors.
        shard_size: Bytes per file.
        ranks: Of several processes the first one writes.
        final_norm: Asked for the factor of the final norm after the last layer; None: it stays.
    """
    rows: list[dict[str, Any]] = []
    origins: list[Origins] = []
    arch, norm = source.arch, source.arch.final_norm_weight
    with writer_of(ranks, folder, shard_size, layout_like(source, kept, dtype)) as writer:
        for name in source.outer_tensor_names:
            if name != norm:
                writer.put(name, (cast(block, dtype, name) for block in source.blocks(name)))
        for new, layer in enumerate(layers):
            rows.append({"new": new, **layer.record, "sha256": write_layer(writer, arch, new, layer.tensors)})
            origins += [layer.origins] if layer.origins else []
            return_freed_memory()
        found = final_norm() if final_norm else None
        writer.add(norm, cast(rescaled(source, found, dtype), dtype, norm))
    write_json(folder / "config.json", merged_config(source, kept, dtype))
    write_side_files(source, folder)
    return Written(rows, origins, found, dict(writer.digests))


def write_layer(writer: Writer, arch: Arch, new: int, tensors: Mapping[str, Iterable[torch.Tensor]]) -> str:
    """Writes a layer piece by piece; returns what `digest_layer` gives."""
    return _digest((n, writer.put(arch.in_layer(new, n), tensors[n])) for n in sorted(tensors))


def averaged_layers(source: Checkpoint, plan: MergePlan, dtype: torch.dtype) -> Iterator[NewLayer]:
    """The new layers of an average, in turn."""
    for weights in plan.layers:
        tensors = {
            name: averaged_blocks(source, name, weights, dtype) for name in names_below(source, min(weights))
        }
        yield NewLayer(tensors, {"from": {str(old): weight for old, weight in weights.items()}})


def fused_layers(streams: Streams, groups: Sequence[Sequence[int]], dtype: torch.dtype) -> Iterator[NewLayer]:
    """The new layers of a fusion, in turn, each solved on what those before it hand on; moves the streams."""
    walk, original, compressed = streams.walk, streams.original, streams.compressed
    for group in groups:
        layer = fuse(walk, group, original, compressed, streams.samples, dtype)
        pieces = {name: [cast(tensor, dtype, name)] for name, tensor in layer.tensors.items()}
        origins = origins_of(layer)
        record = {
            "origins_sha256": digest_of(origins),
            "attention": _solved(layer.attention),
            "mlp": _solved(layer.mlp),
            "residual": pass_fused(walk, layer, original, compressed, streams.samples),
        }
        share = {str(old): share for old, share in shares(layer).items()}
        yield NewLayer(pieces, {"from": share, "fused": record}, origins)


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


def cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """A tensor in another type.

    Raises:
        UnsupportedError: If its values do not fit the type.
    """
    result = tensor.to(dtype)
    if dtype == torch.float16 and not bool(torch.isfinite(result).all()):
        raise UnsupportedError(
            f"{name} has values beyond float16", where="model.dtype", fix="use bfloat16 or float32"
        )
    return result


def digest_layer(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over the names of a layer's tensors and the checksums of their bytes, in order of name."""
    return _digest((name, checksum_of(tensors[name])) for name in sorted(tensors))


def _digest(checksums: Iterable[tuple[str, str]]) -> str:
    lines = (f"{checksum}  {name}\n" for name, checksum in checksums)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
