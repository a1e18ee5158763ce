"""GGUF files that lie about what is in them."""

from pathlib import Path

import gguf

from mkaq.export.gguf_check import faults
from tests.runs import Mkaq, one_message

WORDS = ["one", "two", "three"]
MORE = 10**6


def lying(path: Path) -> Path:
    """A file with an array that says it is longer than the file."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(WORDS)
    writer.add_uint32("a.b", 7)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    said = (gguf.GGUFValueType.STRING).to_bytes(4, "little") + len(WORDS).to_bytes(8, "little")
    data = path.read_bytes()
    assert data.count(said) == 1
    path.write_bytes(data.replace(said, said[:4] + MORE.to_bytes(8, "little")))
    return path


def test_array_that_is_longer_than_its_file(tmp_path: Path, mkaq: Mkaq) -> None:
    """The reader of the package takes what lies beyond the end for empty values, until memory is full."""
    path = lying(tmp_path / "x.gguf")
    one_message(mkaq("generate", path, "x"), 4, str(path), "no whole GGUF file", "the file ends before")
    assert "the file ends before" in next(faults(path, {}, []))
