"""What the tests of reliability did, counted from those that ran and passed, for pytest's summary.

A test says `record_property(KILLS, 163)`; pytest, with processes of its own too, brings that to the summary.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

KILLS, WRITES, PROCESSES = "kills survived", "failed writes survived", "processes killed"
CHANGES, INPUTS = "changes of an artifact found", "bad inputs refused"
ROWS = (KILLS, WRITES, PROCESSES, CHANGES, INPUTS)


class Report(Protocol):
    """What is read of pytest's report of a test."""

    user_properties: list[tuple[str, object]]


def closing_table(passed: Iterable[Report]) -> Iterator[str]:
    """The lines of the table; none if nothing was counted."""
    tests, total = dict.fromkeys(ROWS, 0), dict.fromkeys(ROWS, 0)
    for report in passed:
        for name, count in report.user_properties:
            if name in total:
                tests[name] += 1
                total[name] += int(str(count))
    if not any(total.values()):
        return
    yield f"{'of the tests that passed':<30}{'count':>7}{'tests':>7}"
    for name in filter(tests.get, ROWS):
        yield f"{name:<30}{total[name]:>7,}{tests[name]:>7,}"
    yield f"{'in all':<30}{sum(total.values()):>7,}{sum(tests.values()):>7,}"
