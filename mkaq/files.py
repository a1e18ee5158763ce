"""JSON files, and writes that survive a power cut: a file is synced before it gets its name."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, data: Any) -> None:
    """Writes JSON with an indent of two spaces, in UTF-8, with a final newline.

    A lone surrogate, which JSON can hold and UTF-8 cannot, is written as a JSON escape.
    """
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def replace_json(path: Path, data: Any) -> None:
    """Replaces a JSON file; after a power cut either the old or the new one is there, complete."""
    fresh = path.with_name(f".{path.name.removeprefix('.')}.new")
    write_json(fresh, data)
    sync(fresh)
    fresh.rename(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file's data or a folder's entries are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_file(path: Path) -> bool:
    """Whether there is a file; a name that no file can have, such as a long one, is of none."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_blank(path: Path) -> bool:
    """Whether a file begins with nothing but zeros, as after a power cut between its rename and its sync."""
    with path.open("rb") as file:
        return not file.read(65536).strip(b"\0")
