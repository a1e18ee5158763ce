"""Runs a recipe again and again on a disk that fails, each time at another point.

usage: python -m tests.reliability.worker STEP RECIPE BEFORE WHOLE SCRATCH FAULT...

BEFORE is the folder of an earlier run, with an artifact; WHOLE is that folder after a run of RECIPE. Both
are copied, never changed. Every STEP-th change on the disk meets the fault; then the artifact must be the
earlier one or the whole one, and the same command must end well and with the bytes of WHOLE. Prints a line
of JSON for each fault: what was counted, and a sentence for each point where something was lost or wrong.

Processes are forked from one that has loaded everything, so that a run takes its own time alone.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from mkaq import report
from mkaq.cli import main
from mkaq.pipeline import STAGES
from mkaq.plan import RunPlan
from mkaq.session import LONG
from tests.reliability.disk import Disk, Fault
from tests.runs import run_quietly, tree

ARTIFACT = "artifact"


def run(recipe: Path, folder: Path, disk: Disk | None, told: Path) -> int:
    """Runs mkaq in a process of its own.

    Args:
        recipe: The recipe.
        folder: The run's folder.
        disk: Watched by the process, if given; what happened goes to `told`.calls, if it lives to tell.
        told: Gets what it prints.

    Returns:
        Its exit code; -9 if it was killed.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        with told.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = ["mkaq", "run", str(recipe), "--output", str(folder)]
        if disk:
            disk.watch()
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        sys.stdout.flush()
        sys.stderr.flush()
        if disk:
            told.with_suffix(".calls").write_text(json.dumps(disk.calls))
    finally:
        os._exit(code)


class Trials:
    """The runs of one fault."""

    def __init__(self, fault: Fault, recipe: Path, before: Path, whole: Path, scratch: Path) -> None:
        self.fault, self.recipe, self.before, self.scratch = fault, recipe, before, scratch
        self.told = scratch / "told"
        self.earlier, self.wanted = tree(before / ARTIFACT), tree(whole / ARTIFACT)
        self.folder = scratch / "run"  # of one name, which the bytes may depend on
        self.bad: list[str] = []

    def fresh(self) -> Path:
        """A copy of the earlier run."""
        shutil.rmtree(self.folder, ignore_errors=True)
        return shutil.copytree(self.before, self.folder, symlinks=True)

    def points(self) -> list[str]:
        """Everything that a whole run changes on the disk."""
        assert run(self.recipe, self.fresh(), Disk(self.folder), self.told) == 0, self.told.read_text()
        assert tree(self.folder / ARTIFACT) == self.wanted
        calls: list[str] = json.loads(self.told.with_suffix(".calls").read_text())
        return calls

    def meet(self, at: int, call: str) -> None:
        """One fault, and the same command after it."""
        code = run(self.recipe, self.fresh(), Disk(self.folder, at, self.fault), self.told)
        self._judge(at, call, code)
        if (again := run(self.recipe, self.folder, None, self.told)) != 0:
            self._say(at, call, f"the same command ended with {again}: {self.told.read_text()[-300:]}")
        elif tree(self.folder / ARTIFACT) != self.wanted:
            self._say(at, call, "the same command made another artifact")
        elif left := [p.name for p in self.folder.rglob(".*") if p.suffix in (".partial", ".old", ".link")]:
            self._say(at, call, f"{left} is left over")

    def _judge(self, at: int, call: str, code: int) -> None:
        """What the fault itself may leave."""
        dies = self.fault in ("kill", "power")
        found = tree(self.folder / ARTIFACT) if (self.folder / ARTIFACT).exists() else None
        if dies:
            if code != -signal.SIGKILL:
                self._say(at, call, f"was not killed, and ended with {code}")
            # between two renames neither is there: the next command puts one of them back
            if found is not None and found not in (self.earlier, self.wanted):
                self._say(at, call, "left an artifact that is neither the earlier one nor the new one")
            return
        text = self.told.read_text()
        allowed = (0, 6) if self.fault == "full" else (0, 2, 4, 5, 6)
        if code not in allowed or text.count("mkaq: ") != (code != 0):
            self._say(at, call, f"ended with {code}: {text[-300:]}")
        if "Traceback" in text or "fault of mkaq" in text:
            self._say(at, call, f"told of a fault of its own: {text[-300:]}")
        if found not in ((self.wanted,) if code == 0 else (self.earlier, self.wanted)):
            self._say(at, call, f"ended with {code} and an artifact that is not the one it was")

    def _say(self, at: int, call: str, what: str) -> None:
        self.bad.append(f"{self.fault} at change {at} ({call}): {what}")


def main_() -> None:
    step, *paths = sys.argv[1:6]
    torch.set_num_threads(1)
    long = {stage.NAME: 2 * LONG for stage in STAGES}  # each keeps what it finishes; and no measuring
    RunPlan.seconds = lambda *_: long  # type: ignore[method-assign]
    report.heatmap_png = lambda *_, **__: b""  # and a second of drawing, each time
    warm = Path(paths[-1], "warm")
    shutil.copytree(paths[1], warm, symlinks=True)
    run_quietly(Path(paths[0]), warm)  # whatever is imported or compiled on the way is there for all
    calls: list[str] = []
    for fault in sys.argv[6:]:
        trials = Trials(fault, *(Path(path) for path in paths))  # type: ignore[arg-type]
        calls = calls or trials.points()  # the same for all faults
        chosen = range(1, len(calls) + 1, int(step))
        for at in chosen:
            trials.meet(at, calls[at - 1])
        told: dict[str, Any] = {"changes": len(calls), "tried": len(chosen), "bad": trials.bad}
        print(json.dumps({"fault": fault, **told}), flush=True)


if __name__ == "__main__":
    main_()
