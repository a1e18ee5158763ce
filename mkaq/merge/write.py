"""Writing a merged checkpoint: the source's outer tensors and the new layers."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mkaq.arch.arch import Arch
from mkaq.arch.config import keep_layers
from mkaq.checkpoint.layout import layout_like
from mkaq.checkpoint.output import Output, cast, with_dtype
from mkaq.checkpoint.reader import Checkpoint
from mkaq.checkpoint.shard import checksum_of
from mkaq.checkpoint.side_files import copy_side_files
from mkaq.checkpoint.writer import Writer, writer_of
from mkaq.files import write_json
from mkaq.fit.final_norm import Rescaled, rescaled
from mkaq.heap import return_freed_memory
from mkaq.merge.origins import Origins
from mkaq.ranks import ALONE, Ranks


@dataclass(frozen=True)
class NewLayer:
    """A layer of the merged model.

    Attributes:
        tensors: Each tensor by name below the layer, in flat pieces in order.
        record: Its part of the merge record: `from` (old layers and their weights) and how it was fused.
        origins: The origins of its heads and channels, if it was fused.
    """

    tensors: Mapping[str, Iterable[torch.Tensor]]
    record: dict[str, Any]
    origins: Origins | None = None


@dataclass(frozen=True)
class Written:
    """The results of `write_merged`.

    Attributes:
        rows: The records of the layers.
        origins: The origins of fused layers.
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
    output: Output,
    ranks: Ranks = ALONE,
    final_norm: Callable[[], Rescaled] | None = None,
) -> Written:
    """Writes the merged checkpoint: the source's outer tensors and the new layers.

    Args:
        source: The source checkpoint.
        layers: The new layers in order.
        kept: For each new layer, the old layer whose position in the config it takes.
        folder: Folder of the checkpoint.
        output: How it is written.
        ranks: The processes; the first one writes.
        final_norm: Returns the factor of the final norm, called after the last layer; None keeps the norm.
    """
    rows: list[dict[str, Any]] = []
    origins: list[Origins] = []
    arch, norm, dtype = source.arch, source.arch.final_norm_weight, output.dtype
    with writer_of(ranks, folder, output.shard_size, layout_like(source, kept, dtype)) as writer:
        for name in source.outer_tensor_names:
            if name != norm:
                writer.put(name, (cast(block, dtype, name) for block in source.blocks(name)))
        for new, layer in enumerate(layers):
            rows.append({"new": new, **layer.record, "sha256": write_layer(writer, arch, new, layer.tensors)})
            origins += [layer.origins] if layer.origins else []
            return_freed_memory()
        rescaling = final_norm() if final_norm else None
        writer.add(norm, cast(rescaled(source, rescaling, dtype), dtype, norm))
    write_json(folder / "config.json", merged_config(source, kept, dtype))
    copy_side_files(source.path, folder)
    return Written(rows, origins, rescaling, dict(writer.digests))


def write_layer(writer: Writer, arch: Arch, new: int, tensors: Mapping[str, Iterable[torch.Tensor]]) -> str:
    """Writes a layer piece by piece; returns its `digest_layer`."""
    return _digest((n, writer.put(arch.in_layer(new, n), tensors[n])) for n in sorted(tensors))


def merged_config(source: Checkpoint, kept: Sequence[int], dtype: torch.dtype) -> dict[str, object]:
    """config.json of the merged checkpoint, whose layers take the positions `kept`."""
    where = source.path / "config.json"
    return with_dtype(keep_layers(source.config, source.hf_config.to_dict(), kept, where), dtype)


def digest_layer(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over the names of a layer's tensors and the checksums of their bytes, in order of name."""
    return _digest((name, checksum_of(tensors[name])) for name in sorted(tensors))


def _digest(checksums: Iterable[tuple[str, str]]) -> str:
    lines = (f"{checksum}  {name}\n" for name, checksum in checksums)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
