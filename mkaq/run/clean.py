"""What a run's folder can lose: stages of its store that no link uses, and what killed runs have left.

A stage that holds anything which its handoff.json does not name stays, and so does a link. The caller holds
the lock of the folder.
"""

import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mkaq.errors import UsageError
from mkaq.files import sync
from mkaq.run.inventory import bytes_of, foreign_in, is_folder
from mkaq.run.publish import ARTIFACT, HANDOFF, handoff_place, old_of, scratch_of
from mkaq.run.store import STORE, is_link


@dataclass(frozen=True)
class Item:
    """Something that may be deleted.

    Attributes:
        path: Where it is.
        bytes: Bytes of its files.
        made: When it was made, as of `time.time`.
        unused: Whether it is a stage to which no link leads; else it is a leftover.
    """

    path: Path
    bytes: int
    made: float
    unused: bool


@dataclass(frozen=True)
class Findings:
    """What was found in a run's folder.

    Attributes:
        unused: Stages of the store to which no link leads.
        leftovers: Unfinished stages, artifacts, links and files.
        left: What in the store is neither, nor a stage in use, and why it stays.
        store_bytes: Bytes of the whole store.
    """

    unused: list[Item]
    leftovers: list[Item]
    left: list[tuple[Path, str]]
    store_bytes: int


def look(folder: Path, stages: Sequence[str]) -> Findings:
    """Looks through a run's folder; changes nothing.

    Args:
        folder: The run's folder.
        stages: The names of its stages.

    Raises:
        UsageError: If the store is a link: other runs may use it.
    """
    store = folder / STORE
    if store.is_symlink():
        fix = "delete there what no run needs"
        raise UsageError("the store is a link, and other runs may use what is there", where=store, fix=fix)
    found = Findings([], _beside(folder, stages), [], bytes_of(store) if store.is_dir() else 0)
    links = (path for path in (*folder.glob("*"), *(folder / "evaluate").glob("*")) if path.name[0] != ".")
    used = {path.readlink().name for path in links if is_link(path)}
    stage = re.compile(f"({'|'.join(stages)})-[0-9a-f]{{16}}")
    for path in sorted(store.iterdir()) if store.is_dir() else ():
        name, _, ending = path.name.removeprefix(".").partition(".")
        hidden = path.name[0] == "."
        endings = ("partial", "finished", "old") if hidden else ("",)
        if not (stage.fullmatch(name) and ending in endings and is_folder(path)):
            found.left.append((path, "mkaq did not make it"))
        elif ending == "old" and not (store / name).exists():
            found.left.append((path, "the next run puts it back in its place"))
        elif hidden:
            found.leftovers.extend(_items(path, path))
        elif name not in used and (why := foreign_in(path)):
            found.left.append((path, why))
        elif name not in used:
            found.unused.extend(_items(path, path / HANDOFF, unused=True))
    return found


def choose(found: Findings, now: float, older_than: float = 0, keep: int | None = None) -> list[Item]:
    """All leftovers, and of the unused stages, the oldest first, those that are to go.

    Args:
        found: What there is.
        now: The time, as of `time.time`.
        older_than: Stages that are younger than so many seconds stay.
        keep: Stages go until the store has at most so many bytes; None: all.
    """
    left = found.store_bytes - sum(item.bytes for item in found.leftovers if item.path.parent.name == STORE)
    chosen = list(found.leftovers)
    for item in sorted(found.unused, key=lambda item: item.made):
        if now - item.made >= older_than and (keep is None or left > keep):
            chosen.append(item)
            left -= item.bytes
    return chosen


def delete(item: Item) -> bool:
    """Deletes an item; a stage gets the name of a leftover first, so that no half of one looks whole.

    Returns:
        Whether it was still there.
    """
    path = item.path
    try:
        if not is_folder(path):
            path.unlink()
            return True
        if item.unused:
            path = path.rename(scratch_of(path))
            sync(path.parent)
    except FileNotFoundError:
        return False
    for _ in range(3):  # a file that vanishes meanwhile is gone as well
        with suppress(FileNotFoundError):
            shutil.rmtree(path)
            break
    return True


def _beside(folder: Path, stages: Sequence[str]) -> list[Item]:
    """Leftovers outside the store."""
    artifact = folder / ARTIFACT
    record = handoff_place(artifact, inside=False)
    fresh = record.with_name(f"{record.name}.new")
    places = [scratch_of(artifact)] + [old_of(artifact)] * artifact.exists()
    links = [folder / f".{name}.link" for name in stages]
    links += [folder / "evaluate" / f".{name}.link" for name in ("source", *stages)]
    there = [path for path in places if is_folder(path)] + [path for path in links if is_link(path)]
    there += [fresh] if fresh.is_file() and not fresh.is_symlink() else []
    return [item for path in there for item in _items(path, path)]


def _items(path: Path, dated: Path, *, unused: bool = False) -> list[Item]:
    """The item at a path, as old as `dated`; none if it has vanished."""
    with suppress(FileNotFoundError):
        return [Item(path, bytes_of(path), dated.lstat().st_mtime, unused)]
    return []
