"""A run's folder, held for one process; what a killed one left half-renamed is put right."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mkaq.errors import UsageError
from mkaq.run.publish import handoff_place, old_of, remove, scratch_of
from mkaq.run.store import STORE, is_link

_LOCK, _ARTIFACT = ".lock", "artifact"
_PLACES = ("calibrate", "analyze", "merge", "recover", "quantize", "evaluate", STORE, _ARTIFACT)
_LOGS = ("recipe.yaml", "run.json", "report.html")
_FIX = "choose another folder with --output"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a run's folder for a `with` block.

    Raises:
        UsageError: If another run holds it, it holds what no run made, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = [] if (folder / _LOCK).exists() else _foreign(folder)
        file = (folder / _LOCK).open("w")
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot be written ({error})", where=folder, fix=_FIX) from None
    if foreign:
        (folder / _LOCK).unlink()
        raise UsageError(f"holds {', '.join(foreign)}, which mkaq did not make", where=folder, fix=_FIX)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                "another mkaq run is working here", where=folder, fix=f"wait for it, or {_FIX}"
            ) from None
        for place in _published(folder):
            _repair(place)
        yield


def _published(folder: Path) -> Iterator[Path]:
    """Every place where something was published, or half so."""
    yield folder / _ARTIFACT
    hidden = (folder / STORE).glob(".*") if (folder / STORE).is_dir() else ()
    yield from {path.with_name(path.name[1:].rpartition(".")[0]) for path in hidden}


def _repair(place: Path) -> None:
    scratch, old = scratch_of(place), old_of(place)
    if old.exists() and not place.exists():
        old.rename(place)
    remove(old)
    remove(scratch)


def _foreign(folder: Path) -> list[str]:
    """What lies where a run would write, in a folder that no run has held."""
    places = [name for name in _PLACES if (folder / name).exists() and not _ours(folder / name)]
    return places + [name for name in _LOGS if (folder / name).exists()]


def _ours(place: Path) -> bool:
    if is_link(place) or any(handoff_place(place, inside).exists() for inside in (True, False)):
        return True
    below = list(place.iterdir()) if place.is_dir() else []
    return bool(below) and all(is_link(path) or handoff_place(path, True).exists() for path in below)
