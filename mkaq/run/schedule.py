"""When a run is expected to end, from the times that its stages were expected to take and those they took."""

import time
from collections.abc import Mapping


class Schedule:
    """The stages of a run and their expected times.

    Args:
        expected: Seconds of each stage; of `evaluate`, which comes after each model, of all of them.
    """

    def __init__(self, expected: Mapping[str, float]) -> None:
        self._left = dict(expected)
        self._now, self._again, self._began = "", False, time.time()

    def begin(self, stage: str, *, again: bool = False) -> None:
        """Begins a stage; `again` if there is more of it later."""
        self._now, self._again, self._began = stage, again, time.time()

    def finish(self) -> None:
        """Ends the stage that was begun."""
        spent = time.time() - self._began if self._again else float("inf")
        self._left[self._now] = max(0.0, self._left.get(self._now, 0.0) - spent)
        self._now = ""

    def end(self, seconds: float = 0.0) -> float:
        """The time at which the run is expected to end, as of `time.time`.

        Args:
            seconds: What the step in progress says it still needs, of the stage in progress.
        """
        now = time.time()
        rest = sum(left for stage, left in self._left.items() if stage != self._now)
        return now + max(0.0, seconds, self._own(now - self._began, seconds)) + rest

    def _own(self, spent: float, seconds: float) -> float:
        """What is left of the stage in progress.

        A step that is faster than its stage was expected to be leaves less and less of the difference.
        """
        if not self._now:
            return 0.0
        expected = self._left.get(self._now, 0.0)
        if self._again or not seconds:
            return expected - spent
        total = spent + seconds
        return seconds + max(0.0, expected - total) * seconds / total
