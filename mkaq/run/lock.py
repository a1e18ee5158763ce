"""Exclusive use of a run's folder, and repair of renames that a killed process left unfinished.

The system lets go of a lock whose process is dead, on another host too; .lock says who took it last.
"""

import fcntl
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mkaq.errors import DISK_FULL, UsageError
from mkaq.run.log import LOG
from mkaq.run.publish import ARTIFACT, handoff_place, old_of, remove, scratch_of
from mkaq.run.store import STORE, is_link

_LOCK = ".lock"
_FILES = ("recipe.yaml", LOG, "report.html")
_ELSEWHERE = "choose another folder with --output"


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's: a run has held it, and left what only runs make."""
    lock = folder / _LOCK
    left = (folder / STORE).is_dir() or (folder / LOG).is_file()
    return left and lock.is_file() and not lock.is_symlink()


@contextmanager
def locked(folder: Path, stages: Sequence[str]) -> Iterator[None]:
    """Holds a run's folder for a `with` block, and repairs it first; arguments and errors as for `held`."""
    with held(folder, stages):
        for path in _published(folder):
            _repair(path)
        yield


@contextmanager
def held(folder: Path, stages: Sequence[str], otherwise: str = _ELSEWHERE) -> Iterator[None]:
    """Holds a run's folder for a `with` block, and leaves it as it is.

    Args:
        folder: The run's folder.
        stages: The names of what it publishes or links there, beside the store and the artifact.
        otherwise: What to do if it cannot be held.

    Raises:
        UsageError: If another run holds it, it contains files that mkaq did not make, or it cannot be
            written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held_before = (folder / _LOCK).exists()
        foreign = [name for name in stages if not _may_link(folder / name)]
        foreign += [] if held_before else _foreign(folder)
        if not foreign:
            file = (folder / _LOCK).open("a+")
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        raise UsageError(f"cannot be written ({error})", where=folder, fix=otherwise) from None
    if foreign:
        raise UsageError(f"holds {', '.join(foreign)}, which mkaq did not make", where=folder, fix=otherwise)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = _holder(folder / _LOCK)
            what = f"another mkaq run is working here{holder}"
            raise UsageError(what, where=folder, fix=f"wait for it, or {otherwise}") from None
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M")
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}")
        file.flush()
        yield


def _holder(lock: Path) -> str:
    """Who holds a lock, as far as it says so."""
    with suppress(OSError, UnicodeDecodeError):
        said = lock.read_text()[:200]
        return f" ({said})" if said.isprintable() and said else ""
    return ""


def _published(folder: Path) -> Iterator[Path]:
    """Every path where something is published, or was being published."""
    yield folder / ARTIFACT
    hidden = (folder / STORE).glob(".*") if (folder / STORE).is_dir() else ()
    yield from {path.with_name(path.name[1:].rpartition(".")[0]) for path in hidden}


def _repair(path: Path) -> None:
    scratch, old = scratch_of(path), old_of(path)
    if old.exists() and not path.exists():
        old.rename(path)
    remove(old)
    remove(scratch)


def _foreign(folder: Path) -> list[str]:
    """What else a run would overwrite in a folder that no run has held."""
    folders = [name for name in (STORE, ARTIFACT) if not _may_link(folder / name)]
    return folders + [name for name in _FILES if (folder / name).exists()]


def _may_link(path: Path) -> bool:
    """Whether a path is free, or what is there was published or linked by mkaq."""
    if not (path.exists() or path.is_symlink()) or is_link(path):
        return True
    if any(handoff_place(path, inside).exists() for inside in (True, False)):
        return True
    if not path.is_dir() or path.is_symlink():
        return False
    children = [child for child in path.iterdir() if not child.name.startswith(".")]  # but leftovers
    ours = all(is_link(child) or handoff_place(child, True).exists() for child in children)
    return ours and (bool(children) or path.name == "evaluate")
