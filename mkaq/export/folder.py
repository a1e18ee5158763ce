"""A Hugging Face folder with the codes of a GPTQ checkpoint in another layout: written, and compared."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mkaq.checkpoint.layout import Layout, TensorSpec
from mkaq.checkpoint.reader import Checkpoint
from mkaq.checkpoint.side_files import copy_side_files, side_files
from mkaq.checkpoint.validate import read_headers, read_json
from mkaq.checkpoint.writer import ShardWriter
from mkaq.dtypes import DTYPES
from mkaq.errors import MkaqError, UnsupportedError
from mkaq.export.codes import PARTS, Codes, read_codes
from mkaq.files import write_json
from mkaq.formats import gptq

Tensors = dict[str, torch.Tensor]


class Repacking(NamedTuple):
    """How another layout holds a linear layer.

    Attributes:
        config: The folder's config.json.
        specs: From (out_features, in_features) to every tensor of a layer, by its name in it.
        repack: From a layer's codes and its full name to these tensors; raises UnsupportedError.
        decode: From these tensors to the weight, float32.
    """

    config: Mapping[str, Any]
    specs: Callable[[tuple[int, int]], dict[str, TensorSpec]]
    repack: Callable[[Codes, str], Tensors]
    decode: Callable[[Tensors], torch.Tensor]


def refuse(reason: str, name: str, model: Checkpoint) -> None:
    """Raises an error if there is a reason why a format cannot hold a model.

    Raises:
        UnsupportedError: With that reason.
    """
    if reason:
        fix = f"leave {name} out of export.formats"
        raise UnsupportedError(f"{name} cannot hold this model: {reason}", where=model.path, fix=fix)


def write_folder(model: Checkpoint, folder: Path, how: Repacking, shard_size: int) -> None:
    """Writes a folder, one tensor in memory at a time.

    Args:
        model: A GPTQ checkpoint.
        folder: An empty folder.
        how: The layout to write.
        shard_size: Data bytes per weight file.

    Raises:
        CheckpointError: If a tensor cannot be read.
        UnsupportedError: If the layout cannot hold a linear layer exactly.
    """
    linears = model.quantized_linears
    copy_side_files(model.path, folder)
    write_json(folder / "config.json", how.config)
    with ShardWriter(folder, shard_size, _layout(model, how)) as writer:
        for name in _kept(model):
            writer.put(name, model.blocks(name))
        for linear in linears:
            for part, tensor in how.repack(read_codes(model, linear), linear).items():
                writer.add(f"{linear}.{part}", tensor)


def folder_faults(model: Checkpoint, folder: Path, how: Repacking) -> Iterator[str]:
    """Compares a folder with the checkpoint that it was made from: every file, every tensor bit for bit.

    Yields:
        A sentence for each fault.
    """
    try:
        if read_json(folder / "config.json") != how.config:
            yield "config.json is not the model's with this format's settings"
        stored = replace(model, path=folder, tensors=read_headers(folder))
        yield from _file_faults(model, stored)
        expected = _layout(model, how)
        if faults := list(_header_faults(stored, expected)):
            yield from faults
            return
        for name in _kept(model):
            if not all(_same(*pair) for pair in zip(model.blocks(name), stored.blocks(name), strict=True)):
                yield f"{name} is not the model's"
        for linear, shape in model.quantized_linears.items():
            yield from _linear_faults(model, stored, linear, list(how.specs(shape)), how)
    except (MkaqError, OSError, ValueError) as error:
        yield str(error)


def _linear_faults(
    model: Checkpoint, stored: Checkpoint, linear: str, parts: list[str], how: Repacking
) -> Iterator[str]:
    """Compares tensors with those that would be written, and what they mean with what GPTQ's mean."""
    tensors = {part: stored.read([f"{linear}.{part}"])[f"{linear}.{part}"] for part in parts}
    for part, tensor in how.repack(read_codes(model, linear), linear).items():
        if not _same(tensor, tensors[part]):
            yield f"{linear}.{part} does not hold the model's codes and scales"
            return
    own = {part: model.read([f"{linear}.{part}"])[f"{linear}.{part}"] for part in PARTS}
    if not torch.equal(gptq.dequantize(own, model.quantization or {}), how.decode(tensors)):
        yield f"{linear} decodes to another weight than the model's"


def _layout(model: Checkpoint, how: Repacking) -> Layout:
    """Every tensor: outside the layers first, then layer by layer."""
    linears, layout = model.quantized_linears, {}
    kept = {name: model.tensors[name] for name in _kept(model)}
    names = list(model.outer_tensor_names)
    for index in range(model.num_layers):
        names += model.layer_tensor_names(index)
    for name in names:
        linear, _, part = name.rpartition(".")
        if name in kept:
            layout[name] = TensorSpec(DTYPES[kept[name].dtype], kept[name].shape)
        elif part == PARTS[0]:
            specs = how.specs(linears[linear])
            layout |= {f"{linear}.{other}": spec for other, spec in specs.items()}
    return layout


def _kept(model: Checkpoint) -> list[str]:
    """The tensors that stay as they are: all but the codes."""
    codes = {f"{linear}.{part}" for linear in model.quantized_linears for part in PARTS}
    return sorted(name for name in model.tensors if name not in codes)


def _file_faults(model: Checkpoint, stored: Checkpoint) -> Iterator[str]:
    found = {path.relative_to(stored.path).as_posix() for path in stored.path.rglob("*") if path.is_file()}
    yield from (f"{name} does not belong here" for name in sorted(found - set(stored.files)))
    for name in side_files(model.path):
        path = stored.path / name
        if not path.is_file() or path.read_bytes() != (model.path / name).read_bytes():
            yield f"{name} is not the model's"


def _header_faults(stored: Checkpoint, expected: Layout) -> Iterator[str]:
    found = {name: TensorSpec(DTYPES[info.dtype], info.shape) for name, info in stored.tensors.items()}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            yield f"tensor {name} is {found.get(name)}, not {expected.get(name)}"


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits."""
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)))
