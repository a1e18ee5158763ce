"""`mkaq clean`: what a run's folder loses, what it keeps, and what the next run makes of it."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from mkaq.run.clean import Findings, Item, choose, delete
from mkaq.run.lock import locked
from mkaq.run.publish import HANDOFF
from mkaq.run.store import STORE
from mkaq.units import parse_age
from tests.runs import STAGES, Mkaq, Outcome, one_message, told, tree

pytestmark = pytest.mark.usefixtures("one_thread")
REDONE = ["quantize", "evaluate/quantize", "artifact"]
DAY = 86400


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory, done: Path, plain: Path) -> Path:
    """The run of `done`, then one of 8 bits: two stages are not used. Not to be changed: copy it first."""
    from mkaq.cli import main

    folder = shutil.copytree(done, tmp_path_factory.mktemp("twice") / "run", symlinks=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(
            "sys.argv", ["mkaq", "run", str(plain), "--output", str(folder), "--set", "quantize.bits=8"]
        )
        main()
    assert stop.value.code == 0
    return folder


@pytest.fixture
def folder(twice: Path, tmp_path: Path) -> Path:
    """A copy of `twice`, to clean."""
    return shutil.copytree(twice, tmp_path / "run", symlinks=True)


def unused(folder: Path) -> list[Path]:
    """The folders of the store to which no link leads, by name."""
    used = {path.resolve() for path in folder.rglob("*") if path.is_symlink()}
    return sorted(path for path in (folder / STORE).iterdir() if path.resolve() not in used)


def size(*places: Path) -> int:
    return sum(len(data) for place in places for data in tree(place).values())


def cleaned(outcome: Outcome) -> Any:
    """What `mkaq clean --json` printed."""
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def paths(result: Any) -> list[Path]:
    return sorted(Path(item["path"]) for item in result["items"])


def unlocked(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but .lock, which says when it was held last."""
    return {name: data for name, data in tree(folder).items() if Path(name).name != ".lock"}


def others(folder: Path) -> dict[str, bytes]:
    """Everything in a run's folder but the store."""
    return {name: data for name, data in unlocked(folder).items() if not name.startswith(f"{STORE}/")}


# --- what goes ---------------------------------------------------------------------------------


def test_only_shown_without_yes(folder: Path, mkaq: Mkaq) -> None:
    before, going = unlocked(folder), unused(folder)
    (folder / STORE / f".{going[0].name}.partial").mkdir()
    outcome = mkaq("clean", folder)
    assert outcome.code == 0 and "--yes deletes" in outcome.out
    for path in going:
        assert f"{STORE}/{path.name} " in outcome.out
    assert unlocked(folder) == before and (folder / STORE / f".{going[0].name}.partial").is_dir()


def test_unused_stages_go_and_nothing_else(folder: Path, mkaq: Mkaq) -> None:
    going, before, rest = unused(folder), unlocked(folder), others(folder)
    assert [path.name.partition("-")[0] for path in going] == ["evaluate", "quantize"]
    gone, whole = size(*going), size(folder / STORE)
    result = cleaned(mkaq("clean", folder, "--json"))
    assert (result["deleted"], paths(result), result["bytes"]) == (False, going, gone)
    assert result["store_bytes"] == whole and unlocked(folder) == before
    result = cleaned(mkaq("clean", folder, "--yes", "--json"))
    assert (result["deleted"], paths(result), result["bytes"], result["left"]) == (True, going, gone, [])
    assert result["store_bytes"] == whole - gone == size(folder / STORE)
    assert unused(folder) == [] and others(folder) == rest
    assert not list((folder / STORE).glob(".*"))
    assert "nothing to delete" in mkaq("clean", folder).out


def test_deleted_stage_is_made_again(folder: Path, plain: Path, done: Path, mkaq: Mkaq) -> None:
    assert mkaq("clean", folder, "--yes").code == 0
    bits = ("--set", "quantize.bits=8")
    assert told(mkaq("run", plain, "--output", folder, *bits)) == dict.fromkeys(STAGES, True)
    outcome = mkaq("run", plain, "--output", folder)
    assert told(outcome) == {stage: stage not in REDONE for stage in STAGES}
    assert tree(folder / "artifact") == tree(done / "artifact")


def test_stage_of_a_run_that_stopped_early_is_kept(folder: Path, plain: Path, mkaq: Mkaq) -> None:
    """The links are those of the last recipe as far as it came."""
    assert mkaq("run", plain, "--output", folder, "--until", "calibrate").code == 0
    artifact = tree(folder / "artifact")
    assert mkaq("clean", folder, "--yes").code == 0
    assert sorted(path.name.partition("-")[0] for path in (folder / STORE).iterdir()) == [
        "calibrate",
        "evaluate",
    ]
    assert tree(folder / "artifact") == artifact


def test_what_killed_runs_left_goes(folder: Path, mkaq: Mkaq) -> None:
    kept = (folder / "merge").resolve()
    for path in (kept.with_name(f".{kept.name}.partial"), kept.with_name(f".{kept.name}.old")):
        shutil.copytree(kept, path)
    for name in (".artifact.partial", ".artifact.old"):
        (folder / name).mkdir()
    (folder / ".artifact.handoff.json.new").write_text("{")
    (folder / ".merge.link").symlink_to(f"{STORE}/{unused(folder)[0].name}")
    (folder / "evaluate" / ".merge.link").symlink_to(f"../{STORE}/merge-0")
    result = cleaned(mkaq("clean", folder, "--older-than", "7d", "--yes", "--json"))  # whatever its age
    names = [".artifact.handoff.json.new", ".artifact.old", ".artifact.partial"]
    names += [".merge.link", ".merge.link", f".{kept.name}.old", f".{kept.name}.partial"]
    assert sorted(path.name for path in paths(result)) == sorted(names)
    hidden = {path.name for path in folder.rglob(".*")}
    assert hidden == {".lock", ".artifact.handoff.json"} and (folder / "artifact").is_dir() and kept.is_dir()
    assert len(unused(folder)) == 2


@pytest.mark.parametrize("name", ["merge", "artifact"])
def test_what_the_next_run_puts_back_stays(name: str, folder: Path, plain: Path, mkaq: Mkaq) -> None:
    place = (folder / name).resolve()
    before = unlocked(place)
    old = place.rename(place.with_name(f".{place.name}.old"))
    assert mkaq("clean", folder, "--yes").code == 0
    assert unlocked(old) == before
    outcome = mkaq("run", plain, "--output", folder, "--set", "quantize.bits=8")
    assert told(outcome) == dict.fromkeys(STAGES, True) and unlocked(place) == before


def test_age_and_size_choose() -> None:
    """Four stages of 10 bytes, 1 to 4 days old; 30 more bytes are in use, 5 are a leftover's."""
    stages = [Item(Path(f"{STORE}/{days}"), 10, -DAY * days, unused=True) for days in (2, 4, 1, 3)]
    leftover = Item(Path(f"{STORE}/.x.partial"), 5, 0, unused=False)
    found = Findings(stages, [leftover], [], 75)

    def ages(older_than: float = 0, keep: int | None = None) -> list[float]:
        first, *rest = choose(found, 0, older_than, keep)
        assert first is leftover
        return [-item.made / DAY for item in rest]

    assert ages() == ages(keep=1) == [4, 3, 2, 1]
    assert ages(2 * DAY) == [4, 3, 2] and ages(5 * DAY) == []
    assert (
        ages(keep=70) == []
        and ages(keep=69) == [4]
        and ages(keep=50) == [4, 3]
        and ages(keep=49) == [4, 3, 2]
    )
    assert ages(3 * DAY, keep=31) == [4, 3]


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        (("--older-than", "30h"), 1),
        (("--older-than", "3d"), 2),
        (("--keep", "20GB"), 2),
        (("--keep", "1KB"), 0),
        (("--older-than", "1m", "--keep", "1KB"), 0),
    ],
)
def test_age_and_size_on_the_command_line(
    arguments: tuple[str, ...], left: int, folder: Path, mkaq: Mkaq
) -> None:
    for days, path in enumerate(unused(folder), 1):
        os.utime(path / HANDOFF, (0, time.time() - days * DAY))
    youngest = unused(folder)[0]
    assert mkaq("clean", folder, "--yes", *arguments).code == 0
    assert len(unused(folder)) == left and (left == 0 or youngest in unused(folder))


def test_ages_as_people_write_them() -> None:
    assert [parse_age(text) for text in ("1m", "2h", "1.5D", " 2w ")] == [60, 7200, 1.5 * DAY, 14 * DAY]
    for text in ("", "7", "d", "-1d", "7y", "1e3d", "٣d", "1d2h"):
        with pytest.raises(ValueError, match="is not a time such as"):
            parse_age(text)


# --- what stays --------------------------------------------------------------------------------


def test_what_mkaq_did_not_make_stays(folder: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    store, (evaluation, quantized) = folder / STORE, unused(folder)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "thesis.txt").write_text("mine")
    (store / "notes").mkdir()
    (store / "merge.txt").write_text("mine")
    (store / "merge-0123456789abcdef").symlink_to(outside)
    (store / ".merge-0123456789abcdef.partial").symlink_to(outside)
    (store / ".draft.partial").mkdir()
    (evaluation / "thesis.txt").write_text("mine")
    (quantized / "more").symlink_to(outside)
    (folder / ".bashrc.old").write_text("mine")
    (folder / ".notes.partial").mkdir()
    before = unlocked(tmp_path)
    result = cleaned(mkaq("clean", folder, "--yes", "--json"))
    assert (
        unlocked(tmp_path) == before
        and (store / ".draft.partial").is_dir()
        and (folder / ".notes.partial").is_dir()
    )
    assert result["items"] == [] and result["bytes"] == 0
    left = {Path(row["path"]).name: row["why"] for row in result["left"]}
    strange = (
        "notes",
        "merge.txt",
        "merge-0123456789abcdef",
        ".merge-0123456789abcdef.partial",
        ".draft.partial",
    )
    assert left == {
        **dict.fromkeys(strange, "mkaq did not make it"),
        evaluation.name: "it holds thesis.txt, which mkaq did not make",
        quantized.name: "it holds more, which mkaq did not make",
    }
    assert f"note: {quantized} stays: it holds more" in mkaq("clean", folder).err


@pytest.mark.parametrize("damage", ["gone", "{", "\0\0"])
def test_stage_whose_handoff_cannot_be_read_stays(damage: str, folder: Path, mkaq: Mkaq) -> None:
    place = unused(folder)[0]
    (place / HANDOFF).unlink() if damage == "gone" else (place / HANDOFF).write_text(damage)
    result = cleaned(mkaq("clean", folder, "--yes", "--json"))
    assert unused(folder) == [place]
    assert [row["path"] for row in result["left"]] == [str(place)]
    assert "the handoff is damaged" in result["left"][0]["why"]


def test_stage_that_cannot_be_read_stays(folder: Path, mkaq: Mkaq, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read anything, so it is faked."""
    place, scandir = unused(folder)[1], os.scandir

    def denied(path: Any) -> Any:
        if not isinstance(path, int) and Path(path) == place:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    result = cleaned(mkaq("clean", folder, "--yes", "--json"))
    assert [row["why"] for row in result["left"]] == ["it cannot be read (Permission denied)"]
    assert place.is_dir()


def test_stage_that_lost_a_file_goes(folder: Path, mkaq: Mkaq) -> None:
    (unused(folder)[1] / "model.safetensors").unlink()
    assert mkaq("clean", folder, "--yes").code == 0 and unused(folder) == []


@pytest.mark.parametrize("store", ["empty", "gone"])
def test_store_without_stages(store: str, folder: Path, mkaq: Mkaq) -> None:
    shutil.rmtree(folder / STORE)
    if store == "empty":
        (folder / STORE).mkdir()
    outcome = mkaq("clean", folder, "--yes")
    assert (outcome.code, outcome.out) == (0, "deleted 0 B; the store has 0 B\n")


# --- refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "artifact", "store", "nowhere", "recipe.yaml"])
def test_folder_of_no_run(name: str, folder: Path, mkaq: Mkaq) -> None:
    place = folder / name if name else folder.parent
    before = unlocked(folder.parent)
    one_message(mkaq("clean", place, "--yes"), 2, str(place), "is no run's folder", "fix: give one")
    assert unlocked(folder.parent) == before


def test_home_with_a_lock_of_its_own(mkaq: Mkaq, tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("mine")
    one_message(mkaq("clean", tmp_path, "--yes"), 2, "is no run's folder")
    assert tree(tmp_path) == {".lock": b"mine"}


def test_folder_in_which_a_run_works(folder: Path, mkaq: Mkaq) -> None:
    with locked(folder, ("merge",)):
        before = unlocked(folder)
        for arguments in ((), ("--yes",)):
            outcome = mkaq("clean", folder, *arguments)
            one_message(outcome, 2, "another mkaq run is working here", "fix: wait for it, or clean another")
    assert unlocked(folder) == before


def test_store_that_is_a_link(folder: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    moved = (folder / STORE).rename(tmp_path / "big")
    (folder / STORE).symlink_to(moved)
    before = unlocked(moved)
    one_message(mkaq("clean", folder, "--yes"), 2, str(folder / STORE), "the store is a link")
    assert unlocked(moved) == before


@pytest.mark.parametrize(
    ("option", "value"), [("--older-than", "7"), ("--older-than", "x"), ("--keep", "much"), ("--keep", "0")]
)
def test_wrong_age_or_size(option: str, value: str, folder: Path, mkaq: Mkaq) -> None:
    before = unlocked(folder)
    one_message(mkaq("clean", folder, "--yes", option, value), 2, option, value)
    assert unlocked(folder) == before


# --- interrupted -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 75, "interrupted"),
        (PermissionError(13, "Permission denied"), 2, "cannot be deleted (Permission denied)"),
    ],
)
def test_no_half_of_a_stage_keeps_its_name(
    error: BaseException, code: int, words: str, folder: Path, plain: Path, done: Path, mkaq: Mkaq
) -> None:
    going = unused(folder)

    def half(path: Path) -> None:
        next(path.glob("*.json")).unlink()
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        outcome = mkaq("clean", folder, "--yes")
    assert outcome.code == code and words in outcome.err and outcome.err.count("mkaq: ") == 1
    assert not any(path.exists() and not (path / HANDOFF).exists() for path in going)
    hidden = list((folder / STORE).glob(".*"))
    assert hidden and {path.name for path in hidden} <= {f".{path.name}.partial" for path in going}
    outcome = mkaq("run", plain, "--output", folder)
    assert outcome.code == 0 and not list((folder / STORE).glob(".*"))
    assert tree(folder / "artifact") == tree(done / "artifact")


def test_what_vanishes_meanwhile(folder: Path, mkaq: Mkaq, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = unused(folder)
    rmtree, calls = shutil.rmtree, []

    def vanishing(path: Path) -> None:
        calls.append(path)
        if len(calls) == 1:
            rmtree(second)
            raise FileNotFoundError(2, "No such file or directory")
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", vanishing)
    for days, path in enumerate((second, first)):
        os.utime(path / HANDOFF, (0, time.time() - days * DAY))
    result = cleaned(mkaq("clean", folder, "--yes", "--json"))
    assert paths(result) == [first] and unused(folder) == []
    assert not delete(Item(first, 0, 0, unused=True))
