"""benchmarks/gpu_check.py works, on a CPU and at a small size."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import deadline, guarded, wanted, wheels
from benchmarks.gpu_products import is_product
from tests.runs import ONE_THREAD, ROOT

RUN = f"{ONE_THREAD}; from benchmarks.gpu_check import main; main()"


class Idle:
    """A `Check` of a device that always works."""

    def reset_peaks(self) -> None: ...

    def peaks(self) -> dict[str, int | None]:
        return {"peak_device_bytes": None, "peak_host_bytes": 1}


def test_all_parts_run_on_a_cpu(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--small", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: part["error"] for name, part in record["parts"].items() if part["status"] != "ok"} == {}
    assert len(record["parts"]) == 15 and record["device"] == {"name": "CPU"}
    found = {name: part.get("found") for name, part in record["parts"].items()}
    small = {name: row for name, row in found.items() if name.startswith("small/") and "verify" in row}
    for name, row in small.items():  # the device is the CPU, so both runs must give the same
        assert row["weight_difference"] == 0 and row["hidden_difference"] == 0, name
        assert row["groups_same"] in (None, True) and set(row["perplexity_ratio"].values()) == {1.0}, name
        assert row["codes_equal"] == (None if name == "small/merge_only" else 1.0), name
        assert [told["exit"] for told in row["verify"].values()] == [0, 0], row["verify"]
    assert len(small) == 7
    kernels = found["large/kernels"]
    assert kernels["fastest"] == "numba" and set(kernels["loops"]) == {"plain", "numba"}
    for row in (kernels, *kernels["others"].values()):
        assert row["codes_equal"] > 0.95 and row["error_ratio"] == pytest.approx(1, abs=0.01)
    for work in found["large/products"].values():
        assert 0 < work["products"] <= work["operations"] <= work["seconds"]
    assert (tmp_path / "gpu.md").read_text() == done.stdout.removesuffix("\n")


def test_a_part_brings_the_checkpoint_that_it_needs() -> None:
    def chosen(*asked: str) -> list[str]:
        names = ["small/build", "small/merge_only", "large/kernels", "large/build", "large/products"]
        return [name for name in names if wanted(name, list(asked))]

    assert len(chosen()) == 5
    assert chosen("large/kernels") == ["large/kernels"]
    assert chosen("large/kernels", "small/merge_only") == ["small/build", "small/merge_only", "large/kernels"]
    assert chosen("large/products") == ["large/build", "large/products"]


def test_a_part_that_fails_or_hangs_says_so() -> None:
    def fail() -> dict[str, Any]:
        raise ValueError("no such luck")

    def hang() -> dict[str, Any]:
        while True:
            time.sleep(0.01)

    row = guarded(fail, 10, Idle())
    assert row["status"] == "failed" and row["error"].startswith("ValueError at test_gpu_check.py:")
    row = guarded(hang, 1, Idle())
    assert row["status"] == "failed" and "not done after 1 s" in row["error"]
    assert guarded(fail, 0.5, Idle())["status"] == "no time"
    with deadline(0.2):
        pass
    time.sleep(0.3)  # the deadline of a block that ended in time is off


def test_wheels_say_what_to_bring(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*names: str) -> Callable[[str], object]:
        return lambda name: None if name in names else object()

    monkeypatch.setattr(gpu_check, "find_spec", without())
    assert wheels([]) == "missing here: nothing"
    monkeypatch.setattr(gpu_check, "find_spec", without("bitsandbytes"))
    lines = wheels(["pydantic"]).splitlines()
    assert lines[0] == "missing here: pydantic, bitsandbytes"
    assert any(line.endswith(" bitsandbytes") and "--no-deps" in line for line in lines)
    monkeypatch.setattr(gpu_check, "find_spec", without(*gpu_check.NEEDED, *gpu_check.USEFUL))
    told = wheels(list(gpu_check.NEEDED))
    assert "bitsandbytes (43.2 MB) is not needed" in told and "too large" in told
    assert sum(size for _, size in gpu_check.NEEDED.values()) < gpu_check.LIMIT_MB


def test_products_are_told_from_other_operations() -> None:
    products = "mm addmm bmm _scaled_dot_product_flash_attention linalg_cholesky_ex linalg_solve_triangular"
    assert all(is_product(f"aten::{name}") for name in products.split())
    assert not any(is_product(name) for name in ("aten::mul", "aten::copy_", "aten::add", "cudaLaunchKernel"))
