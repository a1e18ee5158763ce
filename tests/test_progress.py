"""Progress: a step that takes long is told of, and only then."""

import time

import pytest

from mkaq import progress
from mkaq.progress import Progress


def test_step_that_takes_long_is_told_of_again_and_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "STILL", 0.1)
    for step in Progress().track(range(3), "merge"):
        if step == 1:
            time.sleep(0.5)
    told = [line for line in capsys.readouterr().err.splitlines() if "so far" in line]
    assert len(told) >= 2 and all(line.startswith("  merge: step 2 has taken") for line in told)


def test_steps_that_end_are_not_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(Progress().track(range(3), "merge")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
