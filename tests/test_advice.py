"""What the messages advise works."""

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mkaq.errors import UsageError
from mkaq.evaluate import tasks
from tests.runs import Mkaq, one_message, python_of
from tests.tiny import make_model

pytestmark = pytest.mark.usefixtures("one_thread")
PYTHON = python_of("loader")
CALIBRATION = {"num_samples": 8, "max_seq_length": 32}
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, do_sample=False).shape[1] > 3
"""


def fix_of(err: str) -> str:
    return err.partition("fix: ")[2].strip()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of SmolLM2's width, 576."""
    shape = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    return make_model(tmp_path_factory.mktemp("small") / "model", layers=1, vocab_size=4096, **shape)


@pytest.mark.parametrize(
    ("bits", "fix"),
    [
        (
            4,
            "use 64 or 32; -1 is not for transformers on a CPU, ONNX Runtime GenAI; "
            "16 is not for transformers on a CPU, vLLM, vLLM on a CPU",
        ),
        (8, "use 64 or 32; -1 is not for ONNX Runtime GenAI; 16 is not for vLLM"),
        (3, "use 64 or 32 or -1 or 16"),
    ],
)
def test_group_sizes_that_runtimes_run_come_first(
    bits: int, fix: str, small: Path, recipe: Callable[..., Path], mkaq: Mkaq
) -> None:
    quantize = {"method": "gptq", "bits": bits}
    outcome = mkaq("plan", recipe(model={"path": str(small)}, merge=None, quantize=quantize))
    one_message(outcome, 3, "group_size 128 does not divide the 576 inputs")
    assert fix_of(outcome.err) == fix


def test_group_size_fits_every_layer(recipe: Callable[..., Path], mkaq: Mkaq, tmp_path: Path) -> None:
    """64 divides what the first refused layer reads, but not what another one does."""
    shape = {"hidden_size": 64, "intermediate_size": 96}
    model = make_model(tmp_path / "model", layers=1, **shape)
    sections: dict[str, Any] = {"model": {"path": str(model)}, "merge": None, "calibration": CALIBRATION}
    outcome = mkaq("plan", recipe(**sections, quantize={"method": "gptq"}))
    one_message(outcome, 3, "does not divide the 64 inputs")
    sizes = re.findall(r"-?\d+", fix_of(outcome.err))
    assert sizes == ["32", "-1", "16"]
    for size in sizes:
        assert (
            mkaq("plan", recipe(**sections, quantize={"method": "gptq", "group_size": int(size)})).code == 0
        )


@pytest.mark.skipif(not PYTHON.exists(), reason=f"no environment without mkaq at {PYTHON}")
def test_advised_group_sizes_run_in_transformers(
    small: Path, recipe: Callable[..., Path], mkaq: Mkaq, tmp_path: Path
) -> None:
    artifacts = []
    for size in (64, 32):
        quantize = {"method": "gptq", "bits": 4, "group_size": size}
        path = recipe(model={"path": str(small)}, merge=None, calibration=CALIBRATION, quantize=quantize)
        assert mkaq("run", path, "--output", tmp_path / str(size)).code == 0
        artifacts.append(tmp_path / str(size) / "artifact")
    environment = os.environ | {"GPTQMODEL_CPU_WORKERS": "2", "TORCHDYNAMO_DISABLE": "1"}
    environment.pop("PYTHONPATH", None)
    line = [PYTHON, "-c", LOAD, *artifacts]
    loaded = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, timeout=600, env=environment)
    assert loaded.returncode == 0, loaded.stderr[-2000:]


def test_sizes_that_gptq_cannot_pack_go_with_int8(
    recipe: Callable[..., Path], mkaq: Mkaq, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "odd", layers=1, intermediate_size=72)
    sections = {"model": {"path": str(model)}, "merge": None}
    outcome = mkaq("plan", recipe(**sections))
    one_message(outcome, 3, "multiples of 32", "fix: use quantize: {method: bitsandbytes, bits: 8}")
    quantize = {"method": "bitsandbytes", "bits": 8}
    done = mkaq("run", recipe(**sections, calibration=None, quantize=quantize), "--output", tmp_path / "run")
    assert done.code == 0, done.err
    assert mkaq("verify", tmp_path / "run" / "artifact").code == 0


def test_family_that_cannot_be_fused_goes_with_what_is_advised(
    recipe: Callable[..., Path], mkaq: Mkaq, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "gemma2", "gemma2", layers=3)
    merge = {"layers": 1, "order": "measured", "protect": {"first": 1, "last": 0}}
    sections = {"model": {"path": str(model)}, "calibration": CALIBRATION, "quantize": None}
    outcome = mkaq("plan", recipe(**sections, merge={**merge, "fuse": "channels"}))
    one_message(outcome, 3, "fix: use fuse: average, with recover: {method: layerwise}")
    advised = {"merge": {**merge, "fuse": "average"}, "recover": {"method": "layerwise", "steps": 1}}
    done = mkaq("run", recipe(**sections, **advised), "--output", tmp_path / "run")
    assert done.code == 0, done.err


def test_limit_that_would_do_can_be_typed(recipe: Callable[..., Path], mkaq: Mkaq, tmp_path: Path) -> None:
    outcome = mkaq("run", recipe(), "--output", tmp_path / "run", "--max-memory", "100MB")
    words = fix_of(outcome.err).split(" would do")[0].split()
    assert words[0] == "--max-memory" and len(words) == 2
    assert mkaq("run", recipe(), "--output", tmp_path / "run", *words, "--until", "calibrate").code == 0


def test_no_limit_is_advised_that_the_machine_has_not(
    recipe: Callable[..., Path], mkaq: Mkaq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mkaq.plan.memory_of", lambda device, processes=1: 100_000_000)
    one_message(outcome := mkaq("run", recipe(), "--output", tmp_path / "run"), 6, "cpu has 100.00 MB")
    assert "--max-memory" not in outcome.err and fix_of(outcome.err)


def test_harness_is_installed_by_its_own_name(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(UsageError) as raised:
        tasks.run_tasks(None, None, ["x"], None, None)  # type: ignore[arg-type]
    assert raised.value.fix == "pip install lm-eval"
