"""Progress on stderr: a live bar with ETA and memory on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from threading import Event, Thread
from typing import TypeVar

import psutil

from mkaq.console import say

T = TypeVar("T")
STILL = 600.0  # seconds without a step before a message is printed


class Progress:
    """Shows progress on stderr; stdout is for results.

    Args:
        quiet: Print nothing.

    Attributes:
        end_of_run: The time at which the run is expected to end, given the seconds left of the step in
            progress; None if nobody knows.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.terminal = sys.stderr.isatty() and not quiet
        self.peak_bytes = 0
        self.end_of_run: Callable[[float], float] | None = None

    def say(self, text: str) -> None:
        """Prints one line."""
        if not self.quiet:
            say(text, error=True)

    def track(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Yields the items and shows progress."""
        total = len(items) if total is None and isinstance(items, Sized) else total
        with self._watched(what) as steps:
            for item in self._bar(items, what, total) if self.terminal else self._lines(items, what, total):
                steps.append(time.monotonic())
                yield item

    @contextmanager
    def _watched(self, what: str) -> Iterator[list[float]]:
        """Prints a message when a step takes longer than `STILL`, and after each doubling of that time."""
        steps, over = [time.monotonic()], Event()

        def watch() -> None:
            seen, wait = 0, STILL
            while not over.wait(min(STILL, 60) / 10):
                if len(steps) > seen:
                    seen, wait = len(steps), STILL
                elif time.monotonic() - steps[-1] > wait:
                    self.say(f"  {what}: step {len(steps) - 1} has taken {wait / 60:.0f} minutes so far")
                    wait *= 2

        Thread(target=watch, name="watch", daemon=True).start()
        try:
            yield steps
        finally:
            over.set()

    def _bar(self, items: Iterable[T], what: str, total: int | None) -> Iterator[T]:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[memory]}{task.fields[end]}"),
        )
        with Bars(*columns, console=Console(stderr=True)) as bars:
            task = bars.add_task(what, total=total, memory="", end="")
            for item in items:
                yield item
                bars.advance(task)
                left = bars.tasks[task].time_remaining or 0.0
                bars.update(task, memory=f"{self._memory() / 1e9:.2f} GB", end=self._end(left))

    def _lines(self, items: Iterable[T], what: str, total: int | None) -> Iterator[T]:
        began = last = time.monotonic()
        for count, item in enumerate(items, 1):
            yield item
            memory, now = self._memory(), time.monotonic()
            if now - last > 10 and count != total:
                left = (now - began) / count * (total - count) if total else 0.0
                told = f", {left:.0f} s left" if total else ""
                self.say(f"  {what}: {count}/{total or '?'}{told}, {memory / 1e9:.2f} GB{self._end(left)}")
                last = now

    def _end(self, left: float) -> str:
        return f"; run ends {clock(self.end_of_run(left))}" if self.end_of_run else ""

    def _memory(self) -> int:
        current = psutil.Process().memory_info().rss
        self.peak_bytes = max(self.peak_bytes, current)
        return current


def clock(when: float) -> str:
    """A time of `time.time` for a person: hour and minute, with the date unless it is today."""
    then, today = time.localtime(when), time.localtime()
    return time.strftime("%H:%M" if then[:3] == today[:3] else "%Y-%m-%d %H:%M", then)
