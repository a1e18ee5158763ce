"""Two processes on one machine, over gloo: the same plan, and all but a few of the same codes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mkaq import ranks
from mkaq.formats.packing import unpack
from mkaq.quantize.gptq import gptq
from mkaq.quantize.gptq_cpu import NUMBA
from mkaq.quantize.solved import _shared
from mkaq.ranks import Ranks
from tests.group import in_two
from tests.runs import Outcome
from tests.tiny import SIMILAR

AVERAGE = {"layers": 1, **SIMILAR}
CHANNELS = {"layers": 1, "fuse": "channels", "order": "measured"}
RECOVER = {"method": "layerwise", "steps": 5, "batch_size": 4}
EVALUATE = {"perplexity": {"dataset": "builtin", "num_samples": 4, "max_seq_length": 32}}


def torchrun(*program: object) -> subprocess.CompletedProcess[str]:
    """`torchrun --standalone --nproc-per-node 2 ...`, with one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += map(str, program)
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300
    )


def test_distillation_in_more_processes_than_a_batch_has_rows(
    recipe: Callable[..., Path], text: Path, mkaq: Callable[..., Outcome], tmp_path: Path
) -> None:
    """One of two processes has no sequence in a step; the measurements are those of one process."""
    learned = {"dataset": "text", "path": str(text), "num_samples": 24, "max_seq_length": 32}
    written = recipe(
        merge=CHANNELS,
        recover={"method": "distill", "text": learned, "batch_size": 1, "learning_rate": 3e-4},
        quantize=None,
        calibration={"dataset": "builtin", "num_samples": 64, "max_seq_length": 32},
    )
    one, two = tmp_path / "one", tmp_path / "two"
    torch.set_num_threads(1)
    assert mkaq("run", written, "--output", one).code == 0
    done = in_two(tmp_path / "told", "mkaq", "run", written, "--output", two)
    assert done.code == 0, done.err
    checks = [json.loads((run / "distill" / "record.json").read_text())["checks"] for run in (one, two)]
    assert len(checks[0]) == len(checks[1]) > 5
    for key in ("own", "other"):
        mine, others = ([check[key] for check in found] for found in checks)
        assert mine == pytest.approx(others, rel=1e-2)


def codes(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / "quantize" / "model.safetensors")
    return torch.cat([unpack(t, 4).flatten() for n, t in sorted(tensors.items()) if n.endswith(".qweight")])


@pytest.mark.parametrize(
    ("merge", "recover", "target", "differing", "apart"),
    [
        (AVERAGE, None, "input", 1e-3, 2e-3),
        (CHANNELS, None, "source", 0.15, 1e-2),  # solved on few tokens: the last bits of sums go far, how far
        (CHANNELS, RECOVER, "input", 8e-2, 2e-3),  # depends on the processor (0.0004 on one, 0.04 on another)
    ],
    ids=["paper", "fused", "tuned"],
)
def test_two_processes_do_what_one_does(
    merge: dict[str, Any],
    recover: dict[str, Any] | None,
    target: str,
    differing: float,
    apart: float,
    recipe: Callable[..., Path],
    mkaq: Callable[..., Outcome],
    tmp_path: Path,
) -> None:
    quantize = {"method": "gptq", "bits": 4, "group_size": 32, "target": target}
    calibration = {"dataset": "builtin", "num_samples": 256, "max_seq_length": 32}
    written = recipe(
        merge=merge, recover=recover, quantize=quantize, calibration=calibration, evaluate=EVALUATE
    )
    one, two = tmp_path / "one", tmp_path / "two"
    torch.set_num_threads(1)
    assert mkaq("run", written, "--output", one).code == 0
    done = in_two(tmp_path / "told", "mkaq", "run", written, "--output", two, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)  # printed once
    assert told["artifact"] == str(two / "artifact")

    plans = [json.loads((folder / "merge" / "record.json").read_text()) for folder in (one, two)]
    groups = [[list(layer["from"]) for layer in plan["layers"]] for plan in plans]
    assert groups[0] == groups[1]
    share = float((codes(one) != codes(two)).float().mean())
    assert share < differing, share
    measured = [
        json.loads((f / "evaluate/quantize/evaluation.json").read_text())["perplexity"] for f in (one, two)
    ]
    assert measured[0]["tokens"] == measured[1]["tokens"]
    assert measured[0]["perplexity"] == pytest.approx(measured[1]["perplexity"], rel=apart)
    assert mkaq("verify", two / "artifact").code == 0
    log = json.loads((two / "run.json").read_text())
    assert log["processes"] == 2 and not any(row["reused"] for row in log["stages"])


def test_what_is_chosen_is_the_choice_of_the_first_process(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Whatever others would choose: groups, channels, ridges, and the step that tuning keeps."""
    calibration = {
        "dataset": "builtin",
        "num_samples": 19,
        "max_seq_length": 32,
    }  # not a multiple of anything
    merge = {**CHANNELS, "protect": {"first": 0, "last": 0}}  # several groups to choose among
    written = recipe(merge=merge, recover=RECOVER, quantize=None, calibration=calibration)
    made = []
    for name, program in (("alike", "mkaq"), ("contrary", "tests.choices_worker")):
        done = in_two(tmp_path / "told", program, "run", written, "--output", tmp_path / name)
        assert done.code == 0, done.err
        made.append((tmp_path / name / "artifact" / "mkaq-manifest.json").read_bytes())
    assert made[0] == made[1]


class TwoProcesses(Ranks):
    """The other one has needed a damping of 0.1."""

    def maximum(self, value: float) -> float:
        return max(value, 0.1) if 0 < value < 1 else value

    def gather(self, part: torch.Tensor, count: int) -> torch.Tensor:
        return part


def test_all_rows_are_solved_with_the_damping_that_any_process_needs() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 32, generator=generator), torch.randn(256, 32, generator=generator)
    options = {"bits": 4, "group_size": 32, "damp_percent": 0.01}
    found = _shared(weight, x.T @ x, TwoProcesses(), options)
    wanted = gptq(weight, x.T @ x, bits=4, group_size=32, damp_percent=0.1, kernels=NUMBA)
    assert found.damp_percent == 0.1 and torch.equal(found.codes, wanted.codes)


def test_a_run_of_two_processes_is_kept_and_goes_on(recipe: Callable[..., Path], tmp_path: Path) -> None:
    calibration = {"dataset": "builtin", "num_samples": 16, "max_seq_length": 32}
    written = recipe(merge=AVERAGE, calibration=calibration)
    line = "run", written, "--output", tmp_path / "r"
    assert in_two(tmp_path / "told", "mkaq", *line, "--until", "merge").code == 0
    done = torchrun("-m", "mkaq", *line)
    assert done.returncode == 0, done.stderr
    log = json.loads((tmp_path / "r" / "run.json").read_text())
    assert [row["stage"] for row in log["stages"] if row["reused"]] == ["calibrate", "analyze", "merge"]


def test_a_process_that_is_about_to_end_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connections close before the system says that it has ended."""
    asked = list[int]()

    def ended(process: int) -> bool:
        asked.append(process)
        return process == 20 and len(asked) > 4

    monkeypatch.setattr(ranks, "_ended", ended)
    here = ranks._machine()
    assert ranks._gone([(here, 10), (here, 20)]) == "process 1 (pid 20)"
    monkeypatch.setattr(ranks, "_LAST_BREATH", 0.2)
    assert ranks._gone([(here, 10), (here, 30)]) == "another process"


def test_no_thread_of_the_group_outlives_it(tmp_path: Path) -> None:
    """One that drops a tensor while the interpreter ends asks it for a lock, and the process aborts."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, torch\n"
        "from mkaq.ranks import joined\n"
        "with joined(torch.device('cpu')) as (ranks, _):\n"
        "    import mkaq.arch.skeleton, transformers.modeling_utils, torch._dynamo\n"
        "    ranks.barrier()\n"
        "tasks = pathlib.Path('/proc/self/task').glob('*/comm')\n"
        "print(sorted({task.read_text().strip() for task in tasks}), flush=True)\n"
    )
    done = torchrun(script)
    assert done.returncode == 0, done.stderr
    assert "python" in done.stdout and "gloo" not in done.stdout


@pytest.mark.parametrize(("count", "size"), [(7, 2), (8, 3), (3, 3), (100, 7), (2, 8), (0, 2)])
def test_shares_hold_everything_once_in_order(count: int, size: int) -> None:
    shares = [list(range(count))[Ranks(rank, size).slice_of(count)] for rank in range(size)]
    assert [number for share in shares for number in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert not count or shares[0]  # the first process has some of what there is
