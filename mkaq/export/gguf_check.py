"""Compares a GGUF file with what it must hold."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue

from mkaq.export.gguf_tensors import Planned
from mkaq.formats.gguf_types import read


def faults(path: Path, metadata: Mapping[str, GGUFValue], tensors: Sequence[Planned]) -> Iterator[str]:
    """Yields a sentence for each difference.

    Args:
        path: The file; nothing in it is trusted.
        metadata: What its metadata must be.
        tensors: The tensors that it must hold, in order.
    """
    name = path.name
    try:
        reader = read(path)
        fields = {
            key: (list(field.types), field.contents())
            for key, field in reader.fields.items()
            if not key.startswith("GGUF.")
        }
    except Exception as error:  # the reader trusts the file and fails in any way
        yield f"{name} cannot be read: {type(error).__name__}: {str(error)[:100]}"
        return
    wanted = {key: _meaning(value) for key, value in metadata.items()}
    for key in sorted(fields.keys() | wanted.keys()):
        if key not in fields:
            yield f"{name} lacks {key}"
        elif key not in wanted:
            yield f"{name} has {key[:100]}, which does not belong there"
        elif not _same(fields[key], wanted[key]):
            yield f"{name} has another {key} than follows from the checkpoint"
    found = [tensor.name for tensor in reader.tensors]
    if found != [tensor.name for tensor in tensors]:
        yield f"{name} has other tensors, or in another order, than follow from the checkpoint"
        return
    end = reader.data_offset
    for tensor, stored in zip(tensors, reader.tensors, strict=True):
        shape = tuple(int(size) for size in reversed(stored.shape))
        if (stored.tensor_type, shape) != (tensor.kind, tensor.shape) or stored.data_offset != end:
            yield f"{name} has {tensor.name} in another type, shape or place than follows from the checkpoint"
            return
        data = np.ascontiguousarray(stored.data).view(np.uint8)
        if not np.array_equal(data.ravel(), tensor.make().ravel()):
            yield f"{name} has another {tensor.name} than follows from the checkpoint"
        end += -(-stored.n_bytes // reader.alignment) * reader.alignment
    if path.stat().st_size != end:
        yield f"{name} has {path.stat().st_size} bytes instead of {end}"


def _meaning(value: GGUFValue) -> tuple[list[GGUFValueType], Any]:
    """Types and value as the reader gives them."""
    if value.type != GGUFValueType.ARRAY:
        return [value.type], value.value
    sub = value.sub_type or GGUFValueType.get_type(value.value[0])
    return [value.type, sub], list(value.value)


def _same(found: tuple[list[GGUFValueType], Any], wanted: tuple[list[GGUFValueType], Any]) -> bool:
    if found[0] != wanted[0]:
        return False
    if wanted[0][-1] == GGUFValueType.FLOAT32:
        return np.array_equal(np.float32(found[1]), np.float32(wanted[1]))
    return bool(found[1] == wanted[1])
