"""Publishing a folder with its handoff.json atomically: it is complete, or not there.

A stage is built in a scratch folder beside its destination, synced to disk and renamed. Its fingerprint
identifies everything that it was made from; a stage whose fingerprint and files match is not made again.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from mkaq.digests import describe_files, digest_of, sha256_file
from mkaq.errors import VerificationError
from mkaq.files import is_blank, is_file, replace_json, sync, write_json
from mkaq.run.provenance import Provenance

HANDOFF = "handoff.json"
ARTIFACT = "artifact"  # the folder of a run that is shipped
_TIMEOUT = 60  # seconds until a shared file system must show what another process has published


@dataclass(frozen=True)
class Handoff:
    """A published stage.

    Attributes:
        path: Its folder.
        fingerprint: Digest of everything that it was made from.
        files: Path, bytes and sha256 of each file, in order of path.
        reused: Whether it existed already.
    """

    path: Path
    fingerprint: str
    files: tuple[dict[str, Any], ...]
    reused: bool

    def again(self) -> "Handoff":
        """The same stage, marked as reused."""
        return replace(self, reused=True)

    @property
    def digest(self) -> str:
        """One digest of all files."""
        return digest_of(list(self.files))


def publish(
    folder: Path,
    provenance: Provenance,
    build: Callable[[Path], Mapping[str, str]],
    *,
    fresh: bool = False,
    inside: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Handoff:
    """Makes and publishes a stage, or finds it published.

    Args:
        folder: Destination.
        provenance: Everything that the stage is made from.
        build: Writes the files into the given folder; returns known sha256 digests by path.
        fresh: Make the stage again in any case.
        inside: Put handoff.json into the folder. The artifact's is a hidden file beside the folder instead,
            because the folder is shipped.
        say: Reports a stage lost in a power cut.

    Raises:
        VerificationError: If there is a handoff.json that cannot be read.
    """
    stage, fingerprint = provenance.stage, provenance.fingerprint
    handoff_path = handoff_place(folder, inside)
    if not fresh and handoff_path.exists():
        if is_blank(handoff_path):
            say(f"{handoff_path} is blank, as after a power cut: {stage} is made again")
        elif existing := _find(folder, handoff_path, fingerprint, say):
            return existing
    scratch = scratch_of(folder)
    remove(scratch)
    if fresh:
        remove(finished_beside(scratch))
    scratch.mkdir(parents=True)
    try:
        known = build(scratch)
        names = sorted(str(p.relative_to(scratch)) for p in scratch.rglob("*") if p.is_file())
        files = describe_files(scratch, names, known)
        handoff = {"fingerprint": fingerprint, **asdict(provenance), "files": files}
        if inside:
            write_json(scratch / HANDOFF, handoff)
        _sync(scratch)
        _replace(scratch, folder)
        if not inside:
            replace_json(handoff_path, handoff)
        remove(finished_beside(scratch))
    except BaseException:
        remove(scratch)
        raise
    return Handoff(folder, fingerprint, tuple(files), reused=False)


def find_published(folder: Path, claim: Sequence[str], *, inside: bool = True) -> Handoff:
    """Finds a stage that another process has just published.

    Args:
        folder: Its folder.
        claim: Its fingerprint and digest according to that process: a network file system may show an earlier
            stage for a while.
        inside: As for `publish`.

    Raises:
        VerificationError: If it does not appear, or its handoff.json is damaged.
    """
    for _ in range(_TIMEOUT):
        if (path := handoff_place(folder, inside)).exists():
            data = read_handoff(path)
            handoff = Handoff(folder, data["fingerprint"], tuple(data["files"]), reused=True)
            if [handoff.fingerprint, handoff.digest] == list(claim):
                return handoff
        time.sleep(1)
    raise VerificationError(
        "is not what the first process has published here",
        where=folder,
        fix="put the run's folder on a file system that all processes share",
    )


def read_handoff(where: Path) -> dict[str, Any]:
    """Reads a handoff.json.

    Raises:
        VerificationError: If it is damaged.
    """
    fix = "delete it, or use --fresh, to make the stage again"
    try:
        data = json.loads(where.read_text(encoding="utf-8"))
        types = {(type(f["path"]), type(f["bytes"]), type(f["sha256"])) for f in data["files"]}
        if types != {(str, int, str)} or not isinstance(data["fingerprint"], str):
            raise ValueError("no list of files, or no fingerprint")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise VerificationError(f"the handoff is damaged ({error})", where=where, fix=fix) from None
    return dict(data)


def read_provenance(where: Path) -> Provenance | None:
    """What a handoff.json says that its stage was made from; None if it is of a version that did not say it.

    Raises:
        VerificationError: If it is damaged.
    """
    data = read_handoff(where)
    try:
        inputs, libraries = ({n: str(v) for n, v in data[key].items()} for key in ("inputs", "libraries"))
        return Provenance(str(data["stage"]), data["settings"], inputs, str(data["mkaq"]), libraries)
    except (KeyError, AttributeError):
        return None


def read_provenances(places: Iterable[Path]) -> list[Provenance | None]:
    """Reads `read_provenance` of every handoff.json that is there and whole, the oldest first."""
    aged: list[tuple[float, Provenance | None]] = []
    for place in places:
        with suppress(OSError, VerificationError):
            aged.append((place.stat().st_mtime, read_provenance(place)))
    return [provenance for _, provenance in sorted(aged, key=itemgetter(0))]


def _find(folder: Path, handoff_path: Path, fingerprint: str, say: Callable[[str], None]) -> Handoff | None:
    data = read_handoff(handoff_path)
    if data["fingerprint"] != fingerprint:
        return None
    for file in data["files"]:
        path = folder / file["path"]
        if not is_file(path) or path.stat().st_size != file["bytes"] or sha256_file(path) != file["sha256"]:
            say(f"{path} is not as it was written: {data.get('stage', 'its stage')} is made again")
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
    """The path of a folder's handoff.json."""
    return folder / HANDOFF if inside else folder.parent / f".{folder.name}.{HANDOFF}"


def scratch_of(folder: Path) -> Path:
    """The scratch folder in which a folder is built."""
    return folder.parent / f".{folder.name}.partial"


def finished_beside(scratch: Path) -> Path:
    """Where layers are kept that were finished in a scratch folder: another attempt goes on after them."""
    return scratch.with_suffix(".finished")


def old_of(folder: Path) -> Path:
    """The temporary path of the folder that is being replaced."""
    return folder.parent / f".{folder.name}.old"


def remove(folder: Path) -> None:
    """Deletes a folder if it exists; of a link only the link."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)
