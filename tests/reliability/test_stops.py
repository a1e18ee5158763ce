"""A run that is stopped or meets a failing disk, at every change on it: see `worker`.

Every 50th point here; `MKAQ_EVERY=1 make test-reliability` takes all of them.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.counts import KILLS, WRITES
from tests.runs import ROOT

EVERY = int(os.environ.get("MKAQ_EVERY", 50))


FAULTS = ["kill", "power", "full", "error"]


@pytest.fixture(scope="module")
def found(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the worker says of each fault."""
    line = [EVERY, *runs, tmp_path_factory.mktemp("stopped"), *FAULTS]
    command = [sys.executable, "-m", "tests.reliability.worker", *map(str, line)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"fault"')]
    return {one["fault"]: one for one in told}


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_lost_or_wrong(
    fault: str, found: dict[str, Any], record_property: Callable[[str, object], None]
) -> None:
    assert found[fault]["tried"] > 0 and found[fault]["bad"] == []
    record_property(KILLS if fault in ("kill", "power") else WRITES, found[fault]["tried"])
