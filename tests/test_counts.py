"""The table that closes a run of the tests of reliability."""

from types import SimpleNamespace
from typing import Any

from tests.counts import CHANGES, INPUTS, KILLS, closing_table


def test_counts_add_up() -> None:
    told: list[list[tuple[str, Any]]] = [[(KILLS, 163)], [(KILLS, 2), ("other", 9)], [(INPUTS, 1)], []]
    lines = list(closing_table(SimpleNamespace(user_properties=one) for one in told))
    counts = {line[:30].strip(): line[30:].split() for line in lines}
    assert counts[KILLS] == ["165", "2"] and counts[INPUTS] == ["1", "1"] and CHANGES not in counts
    assert counts["in all"] == ["166", "3"]


def test_nothing_counted_is_no_table() -> None:
    assert list(closing_table([SimpleNamespace(user_properties=[("other", 9)])])) == []
