"""Between stages: a published folder and its handoff.json, and nothing else.

A stage is built in a scratch folder beside its place, synced to disk and renamed, so a reader
sees a whole stage or none. Its fingerprint says what it was made of; a stage whose fingerprint
and files match is not made again.
"""

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mkaq import __version__
from mkaq.digests import describe_files, digest_of, library_versions, sha256_file
from mkaq.errors import UsageError, VerificationError
from mkaq.files import is_blank, replace_json, sync, write_json

HANDOFF = "handoff.json"
PLACES = (
    "calibrate",
    "merge",
    "recover",
    "quantize",
    "artifact",
    "evaluate/source",
    "evaluate/merge",
    "evaluate/recover",
    "evaluate/quantize",
)
LOGS = ("recipe.yaml", "run.json", "budget.json", "report.html")
_PATIENCE = 60  # seconds in which a shared file system shows what another process has published


@dataclass(frozen=True)
class Handoff:
    """A published stage.

    Attributes:
        path: Its folder.
        fingerprint: Of everything that it was made of.
        files: Path, bytes and sha256 of each file, in order of path.
        reused: Whether it was there already.
    """

    path: Path
    fingerprint: str
    files: tuple[dict[str, Any], ...]
    reused: bool

    @property
    def digest(self) -> str:
        """One digest for all files."""
        return digest_of(list(self.files))


def fingerprint_of(stage: str, section: Any, inputs: Mapping[str, str]) -> str:
    """The fingerprint of a stage: its part of the recipe, its inputs, mkaq and the libraries."""
    return digest_of(
        {
            "stage": stage,
            "section": section,
            "inputs": inputs,
            "mkaq": __version__,
            "libraries": library_versions(),
        }
    )


def publish(
    folder: Path,
    stage: str,
    section: Any,
    inputs: Mapping[str, str],
    build: Callable[[Path], Mapping[str, str] | None],
    *,
    fresh: bool = False,
    inside: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Handoff:
    """Makes a stage, or finds it made.

    Args:
        folder: Where it is published.
        stage: Its name.
        section: Its part of the recipe, as plain data.
        inputs: Name and digest of what it reads.
        build: Writes its files into the folder that it is given; may return the sha256 of files that it
            has read back, by path.
        fresh: Make it again in any case.
        inside: Put handoff.json into the folder; the artifact's lies beside it instead, hidden,
            because the folder is for others.
        say: Told of what was lost in a power cut and is made again.

    Raises:
        VerificationError: If a handoff.json is there that cannot be read.
    """
    fingerprint = fingerprint_of(stage, section, inputs)
    place = _handoff_place(folder, inside)
    if not fresh and place.exists():
        if is_blank(place):
            say(f"{place} is blank, as after a power cut: {stage} is made again")
        elif found := _find(folder, place, fingerprint):
            return found
    scratch = _scratch(folder)
    _remove(scratch)
    scratch.mkdir(parents=True)
    try:
        known = build(scratch)
        names = sorted(str(p.relative_to(scratch)) for p in scratch.rglob("*") if p.is_file())
        files = describe_files(scratch, names, known)
        handoff = {"stage": stage, "fingerprint": fingerprint, "inputs": dict(inputs), "files": files}
        if inside:
            write_json(scratch / HANDOFF, handoff)
        _sync(scratch)
        _replace(scratch, folder)
        if not inside:
            replace_json(place, handoff)
    except BaseException:
        _remove(scratch)
        raise
    return Handoff(folder, fingerprint, tuple(files), reused=False)


def find_published(folder: Path, claim: Sequence[str], *, inside: bool = True) -> Handoff:
    """The stage that another process has just published.

    Args:
        folder: Where.
        claim: Its fingerprint and digest, as that process has them: a network file system may show an
            earlier one for a while.
        inside: As for `publish`.

    Raises:
        VerificationError: If it does not appear, or its handoff.json is damaged.
    """
    for _ in range(_PATIENCE):
        if (place := _handoff_place(folder, inside)).exists():
            data = read_handoff(place)
            found = Handoff(folder, data["fingerprint"], tuple(data["files"]), reused=True)
            if [found.fingerprint, found.digest] == list(claim):
                return found
        time.sleep(1)
    raise VerificationError(
        "is not what the first process has published here",
        where=folder,
        fix="put the run's folder on a file system that all processes share",
    )


def read_handoff(where: Path) -> dict[str, Any]:
    """A handoff.json.

    Raises:
        VerificationError: If it is damaged.
    """
    fix = "delete it, or use --fresh, to make the stage again"
    try:
        data = json.loads(where.read_text(encoding="utf-8"))
        files = [(str(f["path"]), int(f["bytes"]), str(f["sha256"])) for f in data["files"]]
        if not files or not isinstance(data["fingerprint"], str):
            raise ValueError("no files")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VerificationError(f"the handoff is damaged ({error})", where=where, fix=fix) from None
    return dict(data)


def _find(folder: Path, place: Path, fingerprint: str) -> Handoff | None:
    data = read_handoff(place)
    if data["fingerprint"] != fingerprint:
        return None
    for file in data["files"]:
        path = folder / file["path"]
        if not path.is_file() or path.stat().st_size != file["bytes"] or sha256_file(path) != file["sha256"]:
            return None
    return Handoff(folder, fingerprint, tuple(data["files"]), reused=True)


def _replace(scratch: Path, folder: Path) -> None:
    old = _old(folder)
    _remove(old)
    if folder.exists():
        folder.rename(old)
    try:
        scratch.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    sync(folder.parent)
    _remove(old)


def _handoff_place(folder: Path, inside: bool) -> Path:
    return folder / HANDOFF if inside else folder.parent / f".{folder.name}.{HANDOFF}"


def _foreign(folder: Path) -> list[str]:
    """What lies where a run would write, in a folder that no run has held."""
    stages = [
        name
        for name in PLACES
        if (folder / name).exists()
        and not any(_handoff_place(folder / name, inside).exists() for inside in (True, False))
    ]
    return stages + [name for name in LOGS if (folder / name).exists()]


def _scratch(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.partial"


def _old(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.old"


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a run folder for one process, and repairs what a killed one left half-renamed.

    Raises:
        UsageError: If another run holds it, or it cannot be written.
    """
    fix = "choose another folder with --output"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = [] if (folder / ".lock").exists() else _foreign(folder)
        file = (folder / ".lock").open("w")
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot be written ({error})", where=folder, fix=fix) from None
    if foreign:
        (folder / ".lock").unlink()
        raise UsageError(f"holds {', '.join(foreign)}, which mkaq did not make", where=folder, fix=fix)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                "another mkaq run is working here", where=folder, fix=f"wait for it, or {fix}"
            ) from None
        for place in (folder / name for name in PLACES):
            scratch, old = _scratch(place), _old(place)
            if old.exists() and not place.exists():
                old.rename(place)
            _remove(old)
            _remove(scratch)
        yield
