"""The files of a folder against the list of a manifest."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

from mkaq.checkpoint.side_files import stays_inside
from mkaq.digests import sha256_file


class Listed(Protocol):
    """An entry of a manifest."""

    @property
    def path(self) -> str:
        """Relative to the folder."""

    @property
    def bytes(self) -> int:
        """Its size."""

    @property
    def sha256(self) -> str:
        """Its digest."""


def check_files(folder: Path, files: Sequence[Listed], *, beside: str | None = None) -> list[str]:
    """What is wrong with the files of a folder.

    Args:
        folder: The folder.
        files: What should be there.
        beside: The one file that may be there and is not listed; None: any may.
    """
    faults = []
    for entry in files:
        path = folder / entry.path
        if not stays_inside(folder, entry.path):
            faults.append(f"{entry.path!r} leaves the folder")
        elif not path.is_file():
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
    """What lies in a folder and is not listed; hidden files are left alone, but for those further below."""
    above = {str(parent) for name in listed for parent in PurePosixPath(name).parents}
    extra = []
    for path in sorted(folder.iterdir()):
        if path.name in above and path.is_dir():
            below = (p.relative_to(folder).as_posix() for p in sorted(path.rglob("*")))
            extra += [name for name in below if name not in listed and name not in above]
        elif path.name not in listed and not path.name.startswith("."):
            extra.append(path.name)
    return extra
