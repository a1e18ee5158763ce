"""A run that is stopped or meets a failing disk, at every change on it: see `worker`.

Every 50th point here; `MKAQ_EVERY=1 make test-reliability` takes all of them.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.counts import KILLS, WRITES
from tests.runs import ROOT

EVERY = int(os.environ.get("MKAQ_EVERY", 50))


@pytest.mark.parametrize("fault", ["kill", "power", "full", "error"])
def test_nothing_is_lost_or_wrong(
    fault: str, runs: list[Path], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    command = [sys.executable, "-m", "tests.reliability.worker", fault, *runs, tmp_path, str(EVERY)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["tried"] > 0 and result["bad"] == []
    record_property(KILLS if fault in ("kill", "power") else WRITES, result["tried"])
