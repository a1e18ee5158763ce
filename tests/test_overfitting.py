"""Two hundred lines of one author, learned a hundred times: only what makes the model better is kept."""

import json
from pathlib import Path

import pytest
import yaml

from mkaq.calibrate.text import documents
from mkaq.manifest import MANIFEST
from tests.runs import Mkaq

pytestmark = pytest.mark.long
BUILTIN = "builtin:tiny-llama"


def test_what_overfits_is_ended_and_the_better_weights_are_kept(tmp_path: Path, mkaq: Mkaq) -> None:
    """The source's predictions are learned by heart and held-out text is the better for it; the text itself,
    learned by heart, makes it worse, and nothing of that is kept.
    """
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
    run, found = tmp_path / "run", []
    for share in (0.0, 0.3):
        settings = "--set", f"recover.cross_entropy={share}"
        outcome = mkaq("run", tmp_path / "recipe.yaml", "--output", run, *settings)
        assert outcome.code == 0, outcome.err
        step = json.loads((run / "artifact" / MANIFEST).read_text())["steps"][-1]
        first, second, best, last = (step["checks"][at] for at in (0, 1, step["best"], -1))
        assert last["loss"] < second["loss"] / 2, "nothing was learned by heart"
        found.append((first, best, last, step["steps"]))
        verified = mkaq("verify", run / "artifact", "--source", BUILTIN)
        assert verified.code == 0, verified.err
        assert "the divergences that the manifest says (distill;" in verified.out
    first, best, last, _ = found[0]
    assert best["own"] < first["own"] and best["other"] < first["other"]
    first, best, last, steps = found[1]
    assert best == first and last["own"] > 1.5 * first["own"] and last["step"] < steps / 2
