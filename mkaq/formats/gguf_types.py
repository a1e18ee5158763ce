"""GGUF files and their tensor types: those of the gguf package, and one that it does not know yet.

llama.cpp has Q2_0 since build 9916 (its pull request 24448), gguf 0.19 has not. The package's writer and
reader look types up in its own tables, so Q2_0 is added there; a newer package that has it is left alone.
"""

from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGUFReader, LlamaFileType
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

__all__ = ["Type", "file_type", "read"]
_Q2_0 = 42
_BLOCK = 64, 18  # columns, and bytes: a float16 scale, 2 bits for each column
_FILE_OF_Q2_0 = 41


class _Reader(GGUFReader):
    """The package's reader, which goes on beyond the end of a file, as often as an array's length says."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> NDArray[Any]:
        found = super()._get(offset, dtype, count, override_order)
        if len(found) < int(count):
            raise ValueError(f"the file ends before the {int(count)} values at byte {offset}")
        return found


def read(path: Path) -> GGUFReader:
    """Reads a file; raises anything if it is damaged."""
    return _Reader(path)


def file_type(kind: Type) -> int:
    """llama.cpp's number for a file whose linear layers are of a type."""
    if kind == _Q2_0:
        return _FILE_OF_Q2_0
    named = {"F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_S"}.get(kind.name, f"MOSTLY_{kind.name}")
    return int(LlamaFileType[named])


def _add(name: str, number: int, block: tuple[int, int]) -> None:
    if name not in Type.__members__:
        member = int.__new__(Type, number)
        member._name_, member._value_ = name, number
        Type._member_map_[name] = Type._value2member_map_[number] = member
        GGML_QUANT_SIZES[member] = block


_add("Q2_0", _Q2_0, _BLOCK)
