"""A published folder and its handoff.json: whole, or not there.

A stage is built in a scratch folder beside its place, synced to disk and renamed. Its fingerprint says what
it was made of; a stage whose fingerprint and files match is not made again.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mkaq import __version__
from mkaq.digests import describe_files, digest_of, library_versions, sha256_file
from mkaq.errors import VerificationError
from mkaq.files import is_blank, replace_json, sync, write_json

HANDOFF = "handoff.json"
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

    def again(self) -> "Handoff":
        """The same, found."""
        return replace(self, reused=True)

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
    fingerprint: str,
    inputs: Mapping[str, str],
    build: Callable[[Path], Mapping[str, str]],
    *,
    fresh: bool = False,
    inside: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Handoff:
    """Makes a stage, or finds it made.

    Args:
        folder: Where it is published.
        stage: Its name.
        fingerprint: Of everything that it is made of.
        inputs: Name and digest of what it reads.
        build: Writes its files into the folder that it is given; returns the sha256 of files that it
            knows, by path.
        fresh: Make it again in any case.
        inside: Put handoff.json into the folder; the artifact's lies beside it instead, hidden,
            because the folder is for others.
        say: Told of what was lost in a power cut and is made again.

    Raises:
        VerificationError: If a handoff.json is there that cannot be read.
    """
    place = handoff_place(folder, inside)
    if not fresh and place.exists():
        if is_blank(place):
            say(f"{place} is blank, as after a power cut: {stage} is made again")
        elif found := _find(folder, place, fingerprint):
            return found
    scratch = scratch_of(folder)
    remove(scratch)
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
        remove(scratch)
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
        if (place := handoff_place(folder, inside)).exists():
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
    old = old_of(folder)
    remove(old)
    if folder.exists():
        folder.rename(old)
    try:
        scratch.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    sync(folder.parent)
    remove(old)


def handoff_place(folder: Path, inside: bool) -> Path:
    """Where the handoff.json of a folder lies."""
    return folder / HANDOFF if inside else folder.parent / f".{folder.name}.{HANDOFF}"


def scratch_of(folder: Path) -> Path:
    """Where a folder is built."""
    return folder.parent / f".{folder.name}.partial"


def old_of(folder: Path) -> Path:
    """Where what a folder replaces lies for a moment."""
    return folder.parent / f".{folder.name}.old"


def remove(folder: Path) -> None:
    """Deletes a folder, if it is there; of a link only the link."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)
