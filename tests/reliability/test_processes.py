"""Two processes of which one is killed: the other ends soon and says so, and the same command resumes."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.counts import PROCESSES
from tests.reliability.test_stops import EVERY
from tests.runs import ROOT, tree

EXCHANGES = 100  # of the run below, at least
POINTS = [(n % 2, 2 + n * (EXCHANGES - 2) // 19) for n in range(20)]  # who is killed, and when
SOON = 60  # seconds


def both(recipe: Path, folder: Path, victim: int = 0, at: int = 0) -> list[tuple[int, str]]:
    """Runs a recipe in two processes; the exit codes, and what each said. `at` 0 kills none."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    line = [sys.executable, "-m", "tests.reliability.process", victim, at, "run", recipe, "--output", folder]
    processes = [
        subprocess.Popen(
            [*map(str, line)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | group | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
        )
        for rank in ("0", "1")
    ]
    if at:
        processes[victim].wait(timeout=300)
    ended = time.monotonic()
    result = []
    for process in processes:
        _, said = process.communicate(timeout=SOON if at else 300)
        result.append((process.returncode, said))
    assert not at or time.monotonic() - ended < SOON
    return result


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
