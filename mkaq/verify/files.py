"""Checking the files of a folder against a manifest's list."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

from mkaq.checkpoint.side_files import stays_inside
from mkaq.digests import sha256_file
from mkaq.files import is_file


class Listed(Protocol):
    """A listed file."""

    @property
    def path(self) -> str:
        """Path relative to the folder."""

    @property
    def bytes(self) -> int:
        """Size of the file."""

    @property
    def sha256(self) -> str:
        """sha256 of the file."""


def check_files(folder: Path, files: Sequence[Listed], *, beside: str | None = None) -> list[str]:
    """The faults of a folder's files: missing, changed, outside the folder, or not listed.

    Args:
        folder: The folder.
        files: The listed files.
        beside: The one unlisted file that is allowed; None allows any.
    """
    faults = []
    for entry in files:
        path = folder / entry.path
        if not stays_inside(folder, entry.path):
            faults.append(f"{entry.path!r} leaves the folder")
        elif not is_file(path):
            faults.append(f"{entry.path} is missing")
        elif path.stat().st_size != entry.bytes:
            faults.append(f"{entry.path} has {path.stat().st_size} bytes, not {entry.bytes}")
        elif sha256_file(path) != entry.sha256:
            faults.append(f"{entry.path} has changed: its sha256 is not the manifest's")
    if beside is not None:
        listed = {entry.path for entry in files} | {beside}
        faults += [f"{name} is not in the manifest" for name in _not_listed(folder, listed)]
    return faults


def _not_listed(folder: Path, listed: set[str]) -> list[str]:
    """Unlisted files of a folder; hidden ones count only inside subfolders that hold listed files."""
    parents = {str(parent) for name in listed for parent in PurePosixPath(name).parents}
    unlisted = []
    for path in sorted(folder.iterdir()):
        if path.name in parents and path.is_dir():
            inside = (p.relative_to(folder).as_posix() for p in sorted(path.rglob("*")))
            unlisted += [name for name in inside if name not in listed and name not in parents]
        elif path.name not in listed and not path.name.startswith("."):
            unlisted.append(path.name)
    return unlisted
