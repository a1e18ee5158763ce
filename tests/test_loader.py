"""What mkaq writes loads in an environment without mkaq: transformers, optimum, GPTQModel, bitsandbytes."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mkaq.checkpoint.validate import open_checkpoint
from mkaq.walk.whole_model import whole_model
from tests.runs import Outcome, python_of
from tests.tiny import FAMILIES, make_model

PYTHON = python_of("loader")
GPTQ: dict[str, dict[str, Any]] = {
    "2 bits": {"bits": 2, "sym": False},
    "3 bits": {"bits": 3},
    "3 bits asymmetric": {"bits": 3, "sym": False},
    "4 bits asymmetric": {"bits": 4, "sym": False},
    "4 bits act-order": {"bits": 4, "desc_act": True},
    "4 bits act-order static": {"bits": 4, "desc_act": True, "static_groups": True},
    "8 bits": {"bits": 8},
}
CASES = [(family, "4 bits", {"method": "gptq", "bits": 4}) for family in FAMILIES]
CASES += [("llama", name, {"method": "gptq"} | options) for name, options in GPTQ.items()]
CASES += [("llama", "merged", None)]
CASES += [
    ("llama", "int8", {"method": "bitsandbytes", "bits": 8}),
    ("llama", "nf4", {"method": "bitsandbytes"}),
]

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason=f"no environment without mkaq at {PYTHON} (make .venv-loader/ready makes it)"
)


def test_every_artifact_loads_without_mkaq(
    tmp_path: Path, recipe: Callable[..., Path], mkaq: Callable[..., Outcome]
) -> None:
    ids = torch.randint(2, 4096, (2, 48), generator=torch.Generator().manual_seed(3))
    artifacts = []
    for number, (family, _, section) in enumerate(CASES):
        model = tmp_path / family
        if not model.exists():
            make_model(model, family)
        options = (
            None if section is None else ({"group_size": 32} if section["method"] == "gptq" else {}) | section
        )
        path = recipe(model={"path": str(model)}, quantize=options)
        done = mkaq("run", path, "--output", tmp_path / f"run{number}")
        assert done.code == 0, done.err
        artifacts.append(tmp_path / f"run{number}" / "artifact")
        save_file({"ids": ids}, artifacts[-1] / ".ids.safetensors")

    script = Path(__file__).parent / "load_artifacts.py"
    loaded = subprocess.run(
        [PYTHON, script, *artifacts], capture_output=True, text=True, cwd=tmp_path, timeout=900
    )
    assert loaded.returncode == 0, loaded.stderr[-3000:]

    for (family, name, _), artifact in zip(CASES, artifacts, strict=True):
        theirs = load_file(artifact / ".logits.safetensors")["logits"]
        with torch.no_grad():
            model = whole_model(open_checkpoint(artifact, quantized=True), torch.device("cpu"), torch.float32)
            ours = model(ids, use_cache=False).logits
        error = ((theirs - ours).norm() / ours.norm()).item()
        assert error < 0.03, f"{family}, {name}: logits differ by {error:.3f}"
