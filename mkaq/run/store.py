"""The store of a run: every stage that was made, in a folder named by its fingerprint.

Another ratio, other bits or a budget's next trial finds there what it shares with those before it. The run's
own stages are links into it.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mkaq.errors import UsageError
from mkaq.run.publish import HANDOFF, Handoff, find_published, publish, remove

STORE = "store"


class Store:
    """The published stages of a run.

    Args:
        folder: Of the run.
        fresh: Make every stage again, once.
        say: Told of what was lost in a power cut.
    """

    def __init__(self, folder: Path, fresh: bool, say: Callable[[str], None]) -> None:
        self._folder, self._fresh, self._say = folder, fresh, say
        self._checked: dict[str, Handoff] = {}

    def publish(
        self,
        stage: str,
        fingerprint: str,
        inputs: Mapping[str, str],
        build: Callable[[Path], Mapping[str, str]],
    ) -> Handoff:
        """Makes a stage, or finds it made; what this process has found once it does not read again.

        Raises:
            VerificationError: If it is there and damaged.
        """
        if fingerprint not in self._checked:
            place = self.place(stage, fingerprint)
            place.parent.mkdir(exist_ok=True)
            done = publish(place, stage, fingerprint, inputs, build, fresh=self._fresh, say=self._say)
            self._checked[fingerprint] = done
            return done
        return self._checked[fingerprint].again()

    def find(self, stage: str, claim: Sequence[str]) -> Handoff:
        """What another process has published, by its fingerprint and digest.

        Raises:
            VerificationError: If it does not appear.
        """
        return find_published(self.place(stage, claim[0]), claim)

    def place(self, stage: str, fingerprint: str) -> Path:
        """The folder of a stage."""
        return self._folder / STORE / f"{stage}-{fingerprint[:16]}"

    def unlink(self) -> None:
        """Takes the names away that lead to stages: the recipe that comes may have others."""
        for place in (*self._folder.glob("*"), *(self._folder / "evaluate").glob("*")):
            if is_link(place):
                place.unlink()

    def link(self, name: str, done: Handoff) -> None:
        """Makes a name in the run's folder lead to a stage.

        Raises:
            UsageError: If the name is that of something else.
        """
        place = self._folder / name
        place.parent.mkdir(exist_ok=True)
        if (place.exists() or place.is_symlink()) and not is_link(place):
            if place.is_symlink() or not (place / HANDOFF).is_file():
                raise UsageError(
                    "is no stage of mkaq's", where=place, fix="choose another folder with --output"
                )
            remove(place)  # of a version without a store
        above = "../" * name.count("/")
        fresh = place.with_name(f".{place.name}.link")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(f"{above}{STORE}/{done.path.name}")
        fresh.rename(place)


def is_link(place: Path) -> bool:
    """Whether a place is a link to a stage."""
    return place.is_symlink() and place.readlink().parent.name == STORE
