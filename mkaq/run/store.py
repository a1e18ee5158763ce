"""The store of a run: every stage ever made, in a folder named by its fingerprint.

A run with another ratio or other bits, and each trial of a budget, reuses the stages that it shares with
earlier ones. The run's own stages are links into the store.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mkaq.errors import UsageError
from mkaq.run.provenance import Provenance
from mkaq.run.publish import HANDOFF, Handoff, find_published, publish, read_provenances, remove

STORE = "store"


class Store:
    """The published stages of a run.

    Args:
        folder: The run's folder.
        fresh: Make every stage again, once.
        say: Reports a stage lost in a power cut.
    """

    def __init__(self, folder: Path, fresh: bool, say: Callable[[str], None]) -> None:
        self._folder, self._fresh, self._say = folder, fresh, say
        self._checked: dict[str, Handoff] = {}

    def publish(self, provenance: Provenance, build: Callable[[Path], Mapping[str, str]]) -> Handoff:
        """Makes a stage or finds it published; a stage that this process has found before is not read again.

        Raises:
            VerificationError: If it exists and is damaged.
        """
        fingerprint = provenance.fingerprint
        if fingerprint not in self._checked:
            path = self.place(provenance.stage, fingerprint)
            path.parent.mkdir(exist_ok=True)
            done = publish(path, provenance, build, fresh=self._fresh, say=self._say)
            self._checked[fingerprint] = done
            return done
        return self._checked[fingerprint].again()

    def find(self, stage: str, claim: Sequence[str]) -> Handoff:
        """Finds a stage that another process has published, by its fingerprint and digest.

        Raises:
            VerificationError: If it does not appear.
        """
        return find_published(self.place(stage, claim[0]), claim)

    def stored(self, stage: str) -> list[Provenance | None]:
        """What each stored stage of a name was made from, the oldest first; None if it does not say so."""
        return read_provenances((self._folder / STORE).glob(f"{stage}-*/{HANDOFF}"))

    def place(self, stage: str, fingerprint: str) -> Path:
        """The folder of a stage."""
        return self._folder / STORE / f"{stage}-{fingerprint[:16]}"

    def unlink(self) -> None:
        """Removes the links to stages: the next recipe may have other stages."""
        for path in (*self._folder.glob("*"), *(self._folder / "evaluate").glob("*")):
            if is_link(path):
                path.unlink()

    def link(self, name: str, done: Handoff) -> None:
        """Links a name in the run's folder to a stage.

        Raises:
            UsageError: If the name belongs to something else.
        """
        path = self._folder / name
        path.parent.mkdir(exist_ok=True)
        if (path.exists() or path.is_symlink()) and not is_link(path):
            if path.is_symlink() or not (path / HANDOFF).is_file():
                raise UsageError(
                    "is no stage of mkaq's", where=path, fix="choose another folder with --output"
                )
            remove(path)  # made by a version without a store
        prefix = "../" * name.count("/")
        fresh = path.with_name(f".{path.name}.link")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(f"{prefix}{STORE}/{done.path.name}")
        fresh.rename(path)


def is_link(path: Path) -> bool:
    """Whether a path is a link to a stage."""
    return path.is_symlink() and path.readlink().parent.name == STORE
