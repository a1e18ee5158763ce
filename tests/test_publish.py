"""Folders are published whole or not at all, reused when nothing changed, and never when damaged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mkaq import files
from mkaq.digests import sha256_file
from mkaq.errors import VerificationError
from mkaq.files import replace_json
from mkaq.run import provenance
from mkaq.run.provenance import provenance_of
from mkaq.run.publish import HANDOFF, Handoff, find_published, publish
from tests.runs import tree

DAMAGED = (
    "{",
    "[]",
    "{}",
    '{"fingerprint": "x", "files": []}',
    '{"fingerprint": "x", "files": [{"path": "a"}]}',
    '{"fingerprint": 5, "files": [{"path": "a", "bytes": 1, "sha256": ""}]}',
    '{"fingerprint": "x", "files": [{"path": true, "bytes": 1, "sha256": ""}]}',
    '{"fingerprint": "x", "files": [{"path": "a", "bytes": Infinity, "sha256": ""}]}',
    "[" * 100_000,
    "\udcff",  # not UTF-8
)


OTHER = provenance_of("stage", "other", {})


def writes(text: str) -> Callable[[Path], dict[str, str]]:
    def build(folder: Path) -> dict[str, str]:
        (folder / "sub").mkdir()
        (folder / "a.txt").write_text(text)
        (folder / "sub" / "b.txt").write_text("b")
        return {}

    return build


def fails(folder: Path) -> dict[str, str]:
    (folder / "a.txt").write_text("half")
    raise RuntimeError("stop")


def make(folder: Path, text: str = "one", section: Any = 1, source: str = "x", **options: Any) -> Handoff:
    return publish(folder, provenance_of("stage", section, {"source": source}), writes(text), **options)


def test_handoff_lists_every_file_with_its_digest(tmp_path: Path) -> None:
    done = make(tmp_path / "stage")
    recorded = json.loads((tmp_path / "stage" / "handoff.json").read_text())
    assert [file["path"] for file in recorded["files"]] == ["a.txt", "sub/b.txt"]
    for file in recorded["files"]:
        path = tmp_path / "stage" / file["path"]
        assert (file["bytes"], file["sha256"]) == (path.stat().st_size, sha256_file(path))
    assert (recorded["stage"], recorded["inputs"]) == ("stage", {"source": "x"})
    assert (recorded["fingerprint"], done.reused) == (done.fingerprint, False)


def test_digests_that_the_build_knows_are_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(folder: Path) -> dict[str, str]:
        writes("one")(folder)
        return {"a.txt": "known"}

    hashed = []
    monkeypatch.setattr("mkaq.digests.sha256_file", lambda path: hashed.append(path.name) or "computed")
    done = publish(tmp_path / "stage", OTHER, build)
    assert [file["sha256"] for file in done.files] == ["known", "computed"] and hashed == ["b.txt"]


@pytest.mark.parametrize("inside", [True, False])
def test_unchanged_stage_is_reused(tmp_path: Path, inside: bool) -> None:
    first = make(tmp_path / "stage", inside=inside)
    again = make(tmp_path / "stage", text="two", inside=inside)
    assert again.reused and (tmp_path / "stage" / "a.txt").read_text() == "one"
    assert (again.digest, again.fingerprint) == (first.digest, first.fingerprint)


@pytest.mark.parametrize("change", [{"section": 2}, {"source": "y"}, {"fresh": True}])
def test_changed_stage_is_made_again(tmp_path: Path, change: dict[str, Any]) -> None:
    first = make(tmp_path / "stage")
    second = make(tmp_path / "stage", text="two", **change)
    assert not second.reused and (tmp_path / "stage" / "a.txt").read_text() == "two"
    assert second.digest != first.digest
    assert (second.fingerprint == first.fingerprint) == ("fresh" in change)
    assert list(tmp_path.iterdir()) == [tmp_path / "stage"]


def test_other_versions_make_a_stage_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "stage")
    monkeypatch.setattr(provenance, "library_versions", lambda: {"torch": "99"})
    assert not make(tmp_path / "stage").reused
    assert make(tmp_path / "stage").reused
    monkeypatch.setattr(provenance, "__version__", "99")
    assert not make(tmp_path / "stage").reused


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "delete handoff"])
@pytest.mark.parametrize("inside", [True, False])
def test_damaged_stage_is_made_again(tmp_path: Path, damage: str, inside: bool) -> None:
    make(tmp_path / "stage", inside=inside)
    file = tmp_path / "stage" / "a.txt"
    place = tmp_path / "stage" / "handoff.json" if inside else tmp_path / ".stage.handoff.json"
    match damage:
        case "flip":
            file.write_text("onf")
        case "cut":
            file.write_text("on")
        case "delete":
            file.unlink()
        case _:
            place.unlink()
    assert not make(tmp_path / "stage", inside=inside).reused
    assert file.read_text() == "one" and place.is_file()


def test_json_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, rename = files.os.fsync, Path.rename

    def note_sync(handle: int) -> None:
        done.append(f"sync {Path(f'/proc/self/fd/{handle}').readlink().name}")
        fsync(handle)

    def note_rename(path: Path, to: Path) -> Path:
        done.append(f"rename {path.name} {to.name}")
        return rename(path, to)

    monkeypatch.setattr(files.os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    replace_json(tmp_path / "data.json", {"a": 1})
    new = ".data.json.new"
    assert done == [f"sync {new}", f"rename {new} data.json", f"sync {tmp_path.name}"]
    assert json.loads((tmp_path / "data.json").read_text()) == {"a": 1}


def test_stage_of_another_process_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system may show the stage of an earlier run for a while."""
    make(tmp_path / "stage", "old")
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            make(tmp_path / "stage", "new", section=2)

    monkeypatch.setattr("mkaq.run.publish.time.sleep", nap)
    new = make(tmp_path / "other", "new", section=2)
    found = find_published(tmp_path / "stage", [new.fingerprint, new.digest])
    assert len(naps) == 3 and (found.fingerprint, found.digest) == (new.fingerprint, new.digest)
    with pytest.raises(VerificationError, match="not what the first process has published"):
        find_published(tmp_path / "stage", ["another", new.digest])
    assert sum(naps) == pytest.approx(63)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("size", [0, 500])
def test_handoff_that_a_power_cut_has_blanked_is_made_again(size: int, inside: bool, tmp_path: Path) -> None:
    told: list[str] = []
    make(tmp_path / "stage", inside=inside)
    place = tmp_path / ("stage/handoff.json" if inside else ".stage.handoff.json")
    place.write_bytes(b"\0" * size)
    assert not make(tmp_path / "stage", inside=inside, say=told.append).reused
    assert len(told) == 1 and str(place) in told[0] and "power cut" in told[0]
    assert make(tmp_path / "stage", inside=inside).reused


def test_file_of_a_name_too_long_is_not_there(tmp_path: Path) -> None:
    made = publish(tmp_path / "out", OTHER, writes("one"))
    handoff = json.loads((made.path / HANDOFF).read_text())
    handoff["files"][0]["path"] = "x" * 300
    (made.path / HANDOFF).write_text(json.dumps(handoff))
    assert not publish(tmp_path / "out", OTHER, writes("two")).reused


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_handoff_is_an_error_not_a_restart(tmp_path: Path, content: str) -> None:
    make(tmp_path / "stage")
    place = tmp_path / "stage" / "handoff.json"
    place.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(VerificationError, match=r"handoff.json: the handoff is damaged") as error:
        make(tmp_path / "stage", text="two")
    assert error.value.exit_code == 5 and "--fresh" in str(error.value)
    assert (tmp_path / "stage" / "a.txt").read_text() == "one"
    assert not make(tmp_path / "stage", text="two", fresh=True).reused


def test_failing_build_leaves_the_old_stage(tmp_path: Path) -> None:
    make(tmp_path / "stage")
    before = tree(tmp_path)
    with pytest.raises(RuntimeError, match="stop"):
        publish(tmp_path / "stage", OTHER, fails)
    assert tree(tmp_path) == before
    assert make(tmp_path / "stage").reused


def test_failing_build_leaves_nothing_where_nothing_was(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"):
        publish(tmp_path / "stage", OTHER, fails)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_at_the_sync_leaves_the_old_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "stage")
    before = tree(tmp_path)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        make(tmp_path / "stage", text="two", section=2)
    assert tree(tmp_path) == before


def test_stage_is_complete_when_it_appears(tmp_path: Path) -> None:
    def build(folder: Path) -> dict[str, str]:
        assert tree(tmp_path / "stage")["a.txt"] == b"one"
        return writes("new")(folder)

    make(tmp_path / "stage")
    publish(tmp_path / "stage", OTHER, build)
    assert tree(tmp_path / "stage")["a.txt"] == b"new"


def test_handoff_of_the_artifact_lies_beside_it(tmp_path: Path) -> None:
    make(tmp_path / "artifact", inside=False)
    assert sorted(tree(tmp_path)) == [".artifact.handoff.json", "artifact/a.txt", "artifact/sub/b.txt"]


def test_leftovers_of_a_killed_build_do_not_get_in(tmp_path: Path) -> None:
    (tmp_path / ".stage.partial").mkdir()
    (tmp_path / ".stage.partial" / "stale.txt").write_text("stale")
    make(tmp_path / "stage")
    assert sorted(tree(tmp_path)) == ["stage/a.txt", "stage/handoff.json", "stage/sub/b.txt"]
