"""Memory: flat in depth, as planned, and within the limit that the user sets."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks.memory import write_model
from mkaq.walk.activations import Activations
from tests.runs import Mkaq, command, one_message, tree
from tests.tiny import SIMILAR

DEPTHS = (6, 14)  # benchmarks/memory.py goes on to 32


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """run.json of whole runs, each in its own process, of one shape and several depths."""
    found = {}
    for layers in DEPTHS:
        folder = tmp_path_factory.mktemp(f"deep{layers}")
        write_model(folder / "model", layers, 768)
        recipe = {
            "version": 1,
            "name": "deep",
            "model": {"path": str(folder / "model")},
            "calibration": {"num_samples": 8, "max_seq_length": 64},
            "merge": {"ratio": 0.5, "fuse": "average", "order": "similarity", "manifold": {"points": 256}},
            "recover": None,
            "quantize": {"method": "gptq", "bits": 4, "group_size": 64},
            "evaluate": {"perplexity": {"num_samples": 4, "max_seq_length": 64}},
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        run = command("run", folder / "recipe.yaml", "--output", folder / "run", "--max-memory", "2GB")
        done = subprocess.run(run, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found[layers] = json.loads((folder / "run" / "run.json").read_text())
    return found


def stage_peaks(log: dict[str, Any]) -> dict[str, int]:
    return {row["stage"]: row["peak_memory_bytes"] for row in log["stages"]}


@pytest.mark.parametrize("stage", ["analyze", "merge", "quantize", "evaluate/source"])
def test_peak_does_not_grow_with_depth(logs: dict[int, dict[str, Any]], stage: str) -> None:
    peaks = [stage_peaks(logs[layers])[stage] for layers in DEPTHS]
    print(stage, peaks)
    assert max(peaks) < 1.1 * min(peaks)


@pytest.mark.parametrize("layers", DEPTHS)
def test_peak_is_as_planned(logs: dict[int, dict[str, Any]], layers: int) -> None:
    log = logs[layers]
    print(stage_peaks(log), log["expected_memory_by_stage"])
    assert log["peak_memory_bytes"] == pytest.approx(log["expected_memory_bytes"], rel=0.25)


@pytest.mark.parametrize(
    "sections",
    [
        {"merge": {"layers": 1, **SIMILAR}},
        {"merge": {"layers": 1, "fuse": "average", "order": "measured", "coefficient": "measured"}},
        {
            "merge": {"layers": 1, "fuse": "channels", "order": "measured"},
            "recover": {"method": "layerwise", "steps": 2},
            "quantize": {"method": "gptq", "bits": 4, "group_size": 16, "target": "source"},
        },
    ],
    ids=["similarity", "average", "channels"],
)
def test_hidden_states_in_files_are_the_same(
    sections: dict[str, Any], recipe: Callable[..., Path], mkaq: Mkaq, tmp_path: Path
) -> None:
    calibration = {"dataset": "builtin", "num_samples": 16, "max_seq_length": 32}
    written = recipe(**sections, calibration=calibration)
    planned = json.loads(mkaq("plan", written, "--json").out)
    assert planned["hidden_states"] == "device"
    limit = planned["memory_bytes"] - 1
    assert json.loads(mkaq("plan", written, "--json", "--max-memory", limit).out)["hidden_states"] == "files"
    assert "go to files" in mkaq("plan", written, "--max-memory", limit).out
    for name, limits in {"memory": [], "files": ["--max-memory", limit]}.items():
        assert mkaq("run", written, "--output", tmp_path / name, *limits).code == 0
    assert tree(tmp_path / "memory" / "artifact") == tree(tmp_path / "files" / "artifact")
    assert not [path for path in (tmp_path / "files").iterdir() if path.name.startswith("tmp")]


def test_limit_that_is_too_low_is_refused_with_what_fits(
    recipe: Callable[..., Path], mkaq: Mkaq, tmp_path: Path
) -> None:
    outcome = mkaq("run", recipe(), "--output", tmp_path / "run", "--max-memory", "100MB")
    one_message(outcome, 6, "--max-memory allows 100.00 MB", "would do")
    assert not (tmp_path / "run").exists()
    enough = outcome.err.split("--max-memory ")[-1].split(" would do")[0].replace(" ", "")
    assert mkaq("run", recipe(), "--output", tmp_path / "run", "--max-memory", enough).code == 0


@pytest.mark.parametrize("size", ["lots", "-1GB", "0", "6 GBs"])
def test_limit_that_is_no_size(size: str, recipe: Callable[..., Path], mkaq: Mkaq) -> None:
    one_message(mkaq("plan", recipe(), f"--max-memory={size}"), 2, "--max-memory", "is not a size")


def test_a_copy_is_on_its_own(tmp_path: Path) -> None:
    activations = Activations(torch.device("cpu"), "files", tmp_path)
    values = torch.randn(3, 5, 7)
    copied = activations.copy(values)
    assert torch.equal(copied, values)
    activations.overwrite(copied, values + 1)
    assert torch.equal(copied, values + 1) and not torch.equal(copied, values)


def test_what_is_let_go_of_comes_back(tmp_path: Path) -> None:
    activations = Activations(torch.device("cpu"), "files", tmp_path)
    states = activations.empty((3, 5, 7), torch.bfloat16)
    values = torch.randn(3, 5, 7).bfloat16()
    states.copy_(values)
    activations.release()
    assert torch.equal(states, values)
    assert not list(tmp_path.iterdir())  # the file has no name
    activations.recycle(states)
    assert activations.empty((3, 5, 7), torch.float32) is not states
    assert activations.empty((3, 5, 7), torch.bfloat16) is states
    assert activations.empty((3, 5, 7), torch.bfloat16) is not states
