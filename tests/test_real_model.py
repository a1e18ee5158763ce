"""A real model through every form of recipe that ships, end to end, each verified against its source.

Needs a model of SmolLM2-135M's shape: `MKAQ_REAL_MODEL=FOLDER make test-long`. What each stage took is
printed (`-s`), beside what `mkaq plan` expects.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mkaq.manifest import read_manifest

MODEL = os.environ.get("MKAQ_REAL_MODEL")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not MODEL, reason="MKAQ_REAL_MODEL names no folder with a real model"),
]
CHANNELS = {"layers": 8, "fuse": "channels", "order": "measured"}
AVERAGE = {"layers": 8, "fuse": "average", "order": "back_to_front"}
GPTQ = {"method": "gptq", "group_size": 64}
FORMS: dict[str, dict[str, Any]] = {
    "average": {"merge": AVERAGE},
    "channels, layerwise, 4 bits": {
        "merge": CHANNELS,
        "recover": {"method": "layerwise", "steps": 5},
        "quantize": GPTQ | {"bits": 4},
    },
    "channels, distill, 4 bits": {
        "merge": CHANNELS,
        "recover": {"method": "distill", "text": {"dataset": "builtin", "num_samples": 64}},
        "quantize": GPTQ | {"bits": 4},
    },
    "channels, LoRA": {
        "merge": CHANNELS,
        "recover": {
            "method": "distill",
            "text": {"dataset": "builtin", "num_samples": 64},
            "adapter": {"r": 16},
        },
    },
    "average, layerwise": {"merge": AVERAGE, "recover": {"method": "layerwise", "steps": 5}},
    "4 bits": {"quantize": GPTQ | {"bits": 4}},
    "3 bits": {"quantize": GPTQ | {"bits": 3}},
    "int8": {"quantize": {"method": "bitsandbytes", "bits": 8}},
    "nf4": {"quantize": {"method": "bitsandbytes", "bits": 4}},
    "budget": {
        "merge": {"fuse": "average", "order": "similarity"},
        "quantize": GPTQ,
        "budget": {"bytes": "110MB", "bits": [4, 3]},
    },
}


def mkaq(*arguments: object, threads: int = 2, processes: int = 1) -> str:
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "mkaq", *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def recipe_of(form: str, path: Path) -> Path:
    sections = FORMS[form]
    data: dict[str, Any] = {"version": 1, "name": "real", "model": {"path": MODEL}, **sections}
    if "merge" in sections or sections["quantize"]["method"] == "gptq":
        data["calibration"] = {"num_samples": 16, "max_seq_length": 128}
    data["evaluate"] = {"perplexity": {"num_samples": 4, "max_seq_length": 128}}
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_end_to_end(form: str, processes: int, tmp_path: Path) -> None:
    if processes > 1 and form != "channels, layerwise, 4 bits":
        pytest.skip("two processes run the form that has every stage")
    recipe, folder = recipe_of(form, tmp_path / "r.yaml"), tmp_path / "run"
    mkaq("run", recipe, "--output", folder, threads=2 // processes, processes=processes)
    for threads in (1, 2):
        assert "verified" in mkaq("verify", folder / "artifact", "--source", MODEL, threads=threads)
    log = json.loads((folder / "run.json").read_text())
    expected = log["expected_memory_by_stage"]
    print(f"\n{form}, {processes} processes")
    far = []
    for row in log["stages"]:
        stage, peak = row["stage"].partition("/")[0], row["peak_memory_bytes"]
        planned = expected.get(stage)
        told = f", planned {planned / 1e9:.2f}" if planned else ""
        print(f"  {row['stage']:20} {row['seconds']:7.1f} s  {peak / 1e9:.2f} GB{told}")
        if planned and abs(planned - peak) > 0.25 * peak:
            far.append(f"{row['stage']}: planned {planned / 1e9:.2f} GB, {peak / 1e9:.2f} measured")
    measured = read_manifest(folder / "artifact").evaluation
    print(
        "  perplexity",
        {stage: round(found["perplexity"]["perplexity"], 2) for stage, found in measured.items()},
    )
    assert not far
