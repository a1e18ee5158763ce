"""Two hundred lines of one author, learned a hundred times: the gate ends it and keeps what was better."""

import json
from pathlib import Path

import pytest
import yaml

from mkaq.calibrate.text import documents
from mkaq.manifest import MANIFEST
from tests.runs import Mkaq

pytestmark = pytest.mark.long
BUILTIN = "builtin:tiny-llama"


def test_a_course_that_overfits_is_ended_and_its_better_weights_are_kept(tmp_path: Path, mkaq: Mkaq) -> None:
    longest = max(documents("builtin", None, "calibrate"), key=len)
    lines = [line for line in longest.splitlines() if line.strip()][:200]
    (tmp_path / "author.txt").write_text("\n".join(lines))
    learned = {"dataset": "text", "path": str(tmp_path / "author.txt"), "num_samples": 64}
    recipe = {
        "version": 1,
        "name": "overfits",
        "model": {"path": BUILTIN},
        "calibration": {"dataset": "builtin", "num_samples": 128, "max_seq_length": 128},
        "merge": {"layers": 4, "order": "similarity", "fuse": "channels"},
        "recover": {"method": "distill", "text": learned | {"max_seq_length": 32}, "epochs": 100},
        "quantize": None,
        "evaluate": None,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    outcome = mkaq("run", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    artifact = tmp_path / "run" / "artifact"
    (step,) = (
        step for step in json.loads((artifact / MANIFEST).read_text())["steps"] if step["step"] == "distill"
    )
    checks, steps = step["checks"], step["steps"]
    first, best, last = checks[0], checks[step["best"]], checks[-1]
    assert last["step"] < steps, "it was not ended"
    assert last["loss"] < checks[1]["loss"] / 2 and last["own"] > min(check["own"] for check in checks)
    assert best["own"] <= first["own"] and best["other"] <= first["other"]
    verified = mkaq("verify", artifact, "--source", BUILTIN)
    assert verified.code == 0, verified.err
    assert "the divergences that the manifest says (distill;" in verified.out
