"""Digests of files and plain data, and the versions of the libraries that influence numbers."""

import hashlib
import json
import platform
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "numba", "scipy", "bitsandbytes")


def library_versions() -> dict[str, str]:
    """The versions of Python and of the installed libraries that influence numbers."""
    installed = {name: version for name in _LIBRARIES if (version := _version(name))}
    return {"python": platform.python_version(), **installed}


@cache
def _version(library: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(library)
    return None


def digest_of(data: Any) -> str:
    """The sha256 of plain data in canonical JSON."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(
    folder: Path, names: list[str], known: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Path, bytes and sha256 of files in a folder; digests in `known` are not computed again."""
    digests = known or {}
    return [
        {"path": n, "bytes": (folder / n).stat().st_size, "sha256": digests.get(n) or sha256_file(folder / n)}
        for n in names
    ]
