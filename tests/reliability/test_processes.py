"""Two processes of which one is killed: the other ends soon and says so, and the same command resumes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.counts import PROCESSES
from tests.group import Group
from tests.reliability.test_stops import EVERY
from tests.runs import tree

EXCHANGES = 100  # of the run below, at least
POINTS = [(n % 2, 2 + n * (EXCHANGES - 2) // 19) for n in range(20)]  # who is killed, and when
SOON = 60  # seconds


def both(recipe: Path, folder: Path, victim: int = 0, at: int = 0) -> list[tuple[int, str]]:
    """Runs a recipe in two processes; the exit codes, and what each said. `at` 0 kills none."""
    line = "tests.reliability.process", victim, at, "run", recipe, "--output", folder
    group = Group(folder.with_name("told"), *line)
    first = group.ended(victim)
    other = group.ended(1 - victim, SOON if at else 300)
    told = {victim: first, 1 - victim: other}
    return [(told[rank].code, told[rank].err) for rank in (0, 1)]


@pytest.fixture(scope="module")
def whole(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The artifact of two processes that nobody kills."""
    folder = tmp_path_factory.mktemp("two") / "run"
    assert [code for code, _ in both(runs[0], folder)] == [0, 0]
    return tree(folder / "artifact")


@pytest.mark.parametrize(("victim", "at"), POINTS[9::20] if EVERY > 1 else POINTS)
def test_the_other_process_ends_and_the_run_goes_on(
    victim: int,
    at: int,
    runs: list[Path],
    whole: dict[str, bytes],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    told = both(runs[0], tmp_path / "run", victim, at)
    assert told[victim][0] == -9
    code, said = told[1 - victim]
    assert code == 75, said
    assert f"mkaq: process {victim} (pid " in said and "has ended" in said and "Traceback" not in said
    assert not (tmp_path / "run" / "artifact").exists()
    assert [code for code, _ in both(runs[0], tmp_path / "run")] == [0, 0]
    assert tree(tmp_path / "run" / "artifact") == whole
    record_property(PROCESSES, 1)
