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
        self._now, self._began = "", time.time()

    def begin(self, stage: str) -> None:
        """Begins a stage."""
        self._now, self._began = stage, time.time()

    def finish(self, *, again: bool) -> None:
        """Ends the stage that was begun; `again` if there is more of it later."""
        spent = time.time() - self._began if again else float("inf")
        self._left[self._now] = max(0.0, self._left.get(self._now, 0.0) - spent)
        self._now = ""

    def end(self, seconds: float = 0.0) -> float:
        """The time at which the run is expected to end, as of `time.time`.

        Args:
            seconds: What the step in progress says it still needs, of the stage in progress.
        """
        now = time.time()
        rest = sum(left for stage, left in self._left.items() if stage != self._now)
        own = self._left.get(self._now, 0.0) - (now - self._began) if self._now else 0.0
        return now + max(own, seconds) + rest
