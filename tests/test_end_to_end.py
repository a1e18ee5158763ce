"""One model through the whole command line: what `make quick` runs beside the pure functions."""

import json
from pathlib import Path

import pytest

from tests.runs import Mkaq, one_message
from tests.tiny import CHANNELS, write_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def test_plan_run_inspect_verify_generate(
    tiny: Path, text: Path, mkaq: Mkaq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    calibration = {"dataset": "text", "path": str(text), "num_samples": 16, "max_seq_length": 32}
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny, text, calibration=calibration, merge=CHANNELS)
    planned = json.loads(mkaq("plan", recipe, "--json").out)
    ran = mkaq("run", recipe, "--json")
    assert ran.code == 0, ran.err
    stages = json.loads(ran.out)["stages"]
    assert [stage["stage"] for stage in stages] == ["source", "merge", "quantize"]
    sizes = ("stage", "layers", "parameters")
    assert [[stage[key] for key in sizes] for stage in stages] == [
        [stage[key] for key in sizes] for stage in planned["stages"]
    ]
    assert all(stage["perplexity"]["perplexity"] > 1 for stage in stages)
    artifact = tmp_path / "runs" / "test" / "artifact"
    shown = mkaq("inspect", artifact).out
    assert "channels" in shown and "gptq, 4 bits" in shown
    verified = mkaq("verify", artifact, "--source", tiny)
    assert verified.code == 0, verified.err
    assert mkaq("generate", artifact, "To be", "--max-new-tokens", "3").code == 0
    measured = mkaq("eval", artifact, "--num-samples", "2", "--max-seq-length", "32", "--json")
    assert json.loads(measured.out)["perplexity"]["tokens"] == 62


def test_plan_tells_the_time_and_what_a_run_would_refuse(
    tiny: Path, text: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny, text)
    fits = json.loads(mkaq("plan", recipe, "--json").out)
    assert fits["refused"] is None and fits["seconds"].keys() == fits["memory"].keys()
    little = ("plan", recipe, "--max-memory", "100MB")
    refused = mkaq(*little, "--json")
    assert "--max-memory allows 100.00 MB" in json.loads(refused.out)["refused"]
    shown = mkaq(*little)
    assert shown.code == refused.code == 6 and "the run is expected to need" in shown.err
    assert "time:   about " in shown.out


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize("section", ["calibration", "evaluate"])
def test_text_that_is_not_there_is_found_before_any_work(
    section: str, command: str, tiny: Path, text: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    missing = {"dataset": "text", "path": str(tmp_path / "no.txt"), "max_seq_length": 32}
    sections = {section: {"perplexity": missing} if section == "evaluate" else missing}
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny, text, **sections)
    refused = mkaq(command, recipe, "--output", tmp_path / "run")
    one_message(refused, 2, str(tmp_path / "no.txt"), "no such file or folder")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("until", ["merge", "recover"])
def test_last_stage_that_the_recipe_does_not_have(
    until: str, tiny: Path, text: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny, text, merge=None)
    refused = mkaq("run", recipe, "--output", tmp_path / "run", "--until", until)
    one_message(refused, 2, f"--until: the recipe has no {until}")
    assert not (tmp_path / "run").exists()
