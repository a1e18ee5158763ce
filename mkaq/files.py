"""JSON as mkaq writes it, and files that are whole after a power cut: synced before they have their names."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, data: Any) -> None:
    """Writes JSON in the one form that mkaq writes: two spaces, UTF-8, a final newline.

    Half a surrogate pair, which a config can hold and UTF-8 cannot, is written as JSON's escape of it.
    """
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def replace_json(path: Path, data: Any) -> None:
    """Writes JSON in the place of another file: after a power cut either the old one or the new is there."""
    fresh = path.with_name(f".{path.name.removeprefix('.')}.new")
    write_json(fresh, data)
    sync(fresh)
    fresh.rename(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_blank(path: Path) -> bool:
    """Whether a file holds nothing but zeros, as one may that was renamed and not synced before the power
    failed.
    """
    with path.open("rb") as file:
        return not file.read(65536).strip(b"\0")
