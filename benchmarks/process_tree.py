"""Seconds and peak memory of a command and of all processes that it starts."""

import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

import psutil

from mkaq.peak import high_water

INTERVAL = 0.1


@dataclass(frozen=True)
class Measured:
    """A finished command.

    Attributes:
        seconds: From its start to its exit.
        peak_bytes: The largest memory that its processes held together.
        stdout: What it printed.
    """

    seconds: float
    peak_bytes: int
    stdout: str


class CommandError(Exception):
    """A command that failed; says the end of what it wrote to standard error."""


def run_measured(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Measured:
    """Runs a command to its end.

    Raises:
        CommandError: If its exit status is not 0.
    """
    began = time.perf_counter()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=env, cwd=cwd, **pipes) as process:
        peaks, over = [0], Event()
        sampler = Thread(target=_sample, args=(process.pid, peaks, over))
        sampler.start()
        try:
            stdout, stderr = process.communicate()
            seconds = time.perf_counter() - began
        finally:
            over.set()
            sampler.join()
    if process.returncode:
        raise CommandError(f"exit status {process.returncode}\n{(stderr or stdout)[-4000:]}")
    return Measured(seconds, max(peaks), stdout)


def _sample(pid: int, peaks: list[int], over: Event) -> None:
    with suppress(psutil.Error):
        root = psutil.Process(pid)
        while True:
            # the system's own mark misses no peak of the root between two samples
            peaks[0] = max(peaks[0], tree_bytes(root), high_water(pid))
            if over.wait(INTERVAL):
                return


def tree_bytes(root: psutil.Process) -> int:
    """What a process and its descendants hold: its resident set, and what each of them has for itself.

    Pages that a fork shares with its parent are counted once. The proportional set would count
    them right as well, but makes a process smaller when others on the machine, such as the one that
    measures, have the same libraries open.
    """
    total = root.memory_info().rss
    for child in root.children(recursive=True):
        with suppress(psutil.Error):
            total += child.memory_full_info().uss
    return total
