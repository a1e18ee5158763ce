"""Files that are whole after a power cut: on the disk before they have their names."""

import os
from pathlib import Path
from typing import Any

from mkaq.model.writer import write_json


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
