"""The time that a run is said to take: what is counted, how it is timed, when the run ends."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch

from benchmarks.plan_times import compared, table
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.plan import LONG, too_long
from mkaq.progress import Progress, clock
from mkaq.run import work
from mkaq.run.estimate import Task, Work
from mkaq.run.rates import Rehearsal
from mkaq.run.schedule import Schedule

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def task(tiny: Path) -> Task:
    return Task(open_checkpoint(tiny), CPU, torch.bfloat16, samples=16, length=32)


def test_works_add_up() -> None:
    both = Work(exact=1.0, written=2.0) + Work(exact=2.0, fast=3.0) * 2
    assert both == Work(exact=5.0, fast=6.0, written=2.0)
    assert Work.largest([Work(exact=1.0, fast=4.0), Work(exact=2.0)]) == Work(exact=2.0, fast=4.0)


def test_what_is_counted(task: Task) -> None:
    layers, tokens = task.source.num_layers, 16 * 32
    assert work.measuring(task, layers, 8, 32) == Work(exact=layers * 8 * 32, logits=8 * 32)
    tuned = work.tuning(task, layers - 1, steps=10, batch_size=4)
    end = 10 * 14 * 32  # toward predictions, all samples to learn from
    assert tuned.tuned == (layers - 1) * 10 * 4 * 32 + end
    assert tuned.logits == 3 * end + 8 * 2 * 32
    assert tuned.stepped == (layers - 1) * 10 * task.source.count_weights(task.source.layer_tensor_names(0))
    assert work.tuning(task, 1, 10, 1000).tuned == 2 * 10 * 14 * 32  # no more samples than there are
    candidates = [(1, 2), (2, 2)]
    tried = work.trying(task, candidates, fuse=True, measured=False)
    assert tried.logits == 3 * 2 * 4 * 32 and tried.exact > layers * tokens / 2 and not tried.fast
    averaged = work.trying(task, candidates, fuse=False, measured=True)
    assert averaged.fast > 0 and not averaged.exact
    assert work.trying(task, [], fuse=True, measured=False) == Work()
    alone, joint = (work.solving(task, layers, joint=each, head=False) for each in (False, True))
    assert joint.products > alone.products and joint.exact > alone.exact
    head = work.solving(task, layers, joint=False, head=True)
    assert head.rounded - alone.rounded == task.source.sizes.vocabulary * task.source.sizes.hidden


def test_more_samples_are_more_work_and_more_processes_are_less_for_each(task: Task) -> None:
    source = task.source
    more = Task(source, CPU, task.dtype, samples=64, length=32)
    shared = Task(source, CPU, task.dtype, samples=64, length=32, processes=4)
    for count in (lambda t: work.fusing(t, 2), lambda t: work.solving(t, 2, joint=False, head=True)):
        assert sum(asdict(count(more)).values()) > sum(asdict(count(task)).values())
        assert sum(asdict(count(shared)).values()) < sum(asdict(count(more)).values())


@pytest.mark.parametrize("kind", [field.name for field in fields(Work)])
def test_every_kind_of_work_is_timed(kind: str, task: Task, tmp_path: Path) -> None:
    rehearsal = Rehearsal(task.source, CPU, task.length, tmp_path)
    once = rehearsal.seconds(Work(**{kind: 1e3}))
    assert 0 < once < 10
    assert math.isclose(rehearsal.seconds(Work(**{kind: 2e3})), 2 * once)  # timed once
    assert not list(tmp_path.iterdir())


def test_forward_pass_takes_about_what_is_said(task: Task, tmp_path: Path) -> None:
    from mkaq.walk.walk import LayerWalk

    walk = LayerWalk(task.source, CPU)
    states = walk.embed(torch.zeros(128, 32, dtype=torch.int32))
    with walk.layer(1) as layer:
        times = []
        for _ in range(20):
            began = time.perf_counter()
            walk.run_all(layer, 1, states)
            times.append(time.perf_counter() - began)
        taken = min(times)
    work = Work(exact=128 * 32)
    said = min(Rehearsal(task.source, CPU, 32, tmp_path).seconds(work) for _ in range(5))
    assert taken / 5 < said < 5 * taken  # other tests may run beside it: the quickest of many, both


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time, which a test moves."""
    at = [1000.0]
    monkeypatch.setattr(time, "time", lambda: at[0])
    yield at


def test_end_of_a_run_moves_with_its_stages(now: list[float]) -> None:
    schedule = Schedule({"analyze": 100.0, "merge": 50.0, "evaluate": 30.0})
    assert schedule.end() == 1180
    schedule.begin("evaluate", again=True)
    now[0] = 1010
    assert schedule.end(seconds=1) == 1180
    schedule.finish()
    assert schedule.end() == 1180  # 20 seconds of evaluate are left
    schedule.begin("analyze")
    now[0] = 1050
    assert schedule.end() == 1180 and schedule.end(seconds=200) == 1320  # slower than was expected
    now[0] = 1210
    assert schedule.end() == 1280  # the stage is over its time
    schedule.finish()
    assert schedule.end() == 1280
    schedule.begin("artifact")  # no time was expected
    assert schedule.end() == 1280


def test_end_comes_nearer_where_a_stage_is_faster(now: list[float]) -> None:
    schedule = Schedule({"quantize": 300.0})
    schedule.begin("quantize")
    ends = []
    for now[0], left in ((1010, 140.0), (1075, 75.0), (1149, 1.0)):  # 150 seconds in all
        ends.append(schedule.end(seconds=left))
    assert ends == [pytest.approx(1290), pytest.approx(1225), pytest.approx(1151)]


def test_progress_tells_when_the_run_ends(capsys: pytest.CaptureFixture[str], now: list[float]) -> None:
    progress = Progress()
    progress.end_of_run = lambda left: 1000 + left
    monotonic = iter(range(0, 10_000, 20))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: float(next(monotonic)))
        list(progress.track(range(3), "merge"))
    assert f"run ends {clock(1000)}"[:-3] in capsys.readouterr().err


def test_clock_names_the_day_unless_it_is_today() -> None:
    assert len(clock(time.time())) == 5
    assert len(clock(time.time() + 3 * 86400)) == 16


def test_long_runs_get_advice() -> None:
    short = {"merge": LONG / 4, "recover": LONG / 2}
    assert list(too_long(short, CPU)) == []
    (advice,) = too_long({"merge": LONG / 4, "recover": LONG}, CPU)
    assert "recover takes 80%" in advice and "on a GPU" in advice and "recover.steps" in advice
    assert "on a GPU" not in next(too_long({"merge": 2 * LONG}, torch.device("cuda")))


def test_table_of_expected_and_taken_times() -> None:
    stage = {"stage": "evaluate/source", "seconds": 20.0, "reused": False}
    log = {"stages": [stage, stage], "expected_seconds_by_stage": {"evaluate": 50.0, "merge": 1.0}}
    rows = compared("toy", log)
    assert rows == [{"run": "toy", "stage": "evaluate", "expected": 50.0, "taken": 40.0}]
    assert "| toy | evaluate | 50 s | 40 s | 0.80 |" in table(rows)
    with pytest.raises(SystemExit, match="kept"):
        compared("toy", {**log, "stages": [{**stage, "reused": True}]})
