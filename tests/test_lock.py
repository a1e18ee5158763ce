"""A run's folder: held by one process, and put right after one that was killed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mkaq.errors import UsageError
from mkaq.run.lock import locked
from mkaq.run.provenance import provenance_of
from mkaq.run.publish import publish
from tests.runs import tree

STAGES = ("calibrate", "analyze", "merge", "recover", "quantize", "evaluate")
HOLD = """import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
input()
"""


def make(folder: Path, text: str = "one") -> bool:
    """Publishes a stage; whether it was there already."""

    def build(scratch: Path) -> dict[str, str]:
        (scratch / "a.txt").write_text(text)
        return {}

    return publish(folder, provenance_of("stage", None, {}), build, inside=folder.name != "artifact").reused


def test_run_folder_is_held_by_one_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="another mkaq run is working here"), locked(tmp_path, STAGES):
            pass
        other.communicate("\n")
    holder = rf"here \(process {os.getpid()} on .+, since \d{{4}}-.+\)"
    with locked(tmp_path, STAGES), pytest.raises(UsageError, match=holder), locked(tmp_path, STAGES):
        pass
    with locked(tmp_path, STAGES):
        pass


def test_folder_that_cannot_be_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"), locked(tmp_path / "file" / "run", STAGES):
        pass


@pytest.mark.parametrize("stage", ["store/merge-0123456789abcdef", "artifact"])
def test_stage_that_a_killed_run_left_half_renamed_is_restored(tmp_path: Path, stage: str) -> None:
    place = tmp_path / stage
    make(place)
    (tmp_path / ".lock").touch()  # a killed run leaves it
    before = tree(place)
    place.rename(place.parent / f".{place.name}.old")
    (place.parent / f".{place.name}.partial").mkdir()
    with locked(tmp_path, STAGES):
        assert tree(place) == before
        assert [path.name for path in place.parent.iterdir() if path.name[0] != "."] == [place.name]
        assert make(place)
    assert not list(place.parent.glob(".*.old")) + list(place.parent.glob(".*.partial"))


def test_old_stage_beside_a_new_one_is_removed(tmp_path: Path) -> None:
    for stage in ("store/merge-0123456789abcdef", "artifact"):
        place = tmp_path / stage
        old = place.with_name(f".{place.name}.old")
        make(place)
        make(old, text="older")
        with locked(tmp_path, STAGES):
            assert not old.exists()
            assert (place / "a.txt").read_text() == "one"


def test_files_of_others_in_the_run_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes" / ".draft.partial").mkdir(parents=True)
    (tmp_path / "notes" / ".draft.partial" / "chapter.txt").write_text("mine")
    (tmp_path / ".profile.old").write_text("mine")
    before = tree(tmp_path)
    with locked(tmp_path, STAGES):
        pass
    assert {k: v for k, v in tree(tmp_path).items() if k != ".lock"} == before
