"""What a run that ended early has left in a folder where an earlier one was finished."""

from pathlib import Path

from tests.runs import STAGES, kept


def added(folder: Path, earlier: Path) -> set[str]:
    """The stages that were made beside those of the earlier run, all of which is as it was."""
    now, before = kept(folder), kept(earlier)
    assert before.items() <= now.items()
    places = [Path(name).parts for name in now.keys() - before.keys()]
    assert all(parts[0] == "store" for parts in places)
    return {parts[1].rpartition("-")[0] for parts in places}


def stopped_in(stage: str, folder: Path, earlier: Path, whole: Path) -> None:
    """What the earlier run made is there, the stages before `stage` are those of `whole`, and that is all.

    The folder shows these stages, and none of the earlier run's in the place of those to come.
    """
    expected, every = kept(earlier), kept(whole)
    for name in STAGES[: STAGES.index(stage)]:
        place = (whole / name).resolve().relative_to(whole.resolve()).as_posix()
        expected |= {file: data for file, data in every.items() if file.startswith(f"{place}/")}
        assert (folder / name).readlink() == (whole / name).readlink()
    found = kept(folder)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    shown = [name for name in STAGES if (folder / name).is_symlink()]
    assert shown == STAGES[: STAGES.index(stage)]
