"""Models that bring code along: it is never run, and what transformers has itself does without it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mkaq.calibrate.tokenizer import load_tokenizer
from mkaq.checkpoint.resolve import BUILTIN
from tests.bad_input.damage import Damage
from tests.runs import Mkaq, one_message, tree
from tests.tiny import edit_config, make_model, write_recipe

CONFIG = "tokenizer_config.json"
STEPS: dict[str, dict[str, Any]] = {
    "gptq": {"recover": {"method": "layerwise", "steps": 1}},
    "int8": {"merge": None, "quantize": {"method": "bitsandbytes", "bits": 8}},
}


def with_code(folder: Path, marker: Path, **tokenizer: Any) -> Path:
    """Gives a model code that would leave a mark, and the keys that ask for it."""
    code = f"open({str(marker)!r}, 'w')\nclass Own: pass\n"
    for name in ("configuration_own", "modeling_own", "tokenization_own", "pipeline_own"):
        (folder / f"{name}.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    config["custom_pipelines"] = {"text-generation": {"impl": "pipeline_own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    config = json.loads((folder / CONFIG).read_text())
    config |= {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", "tokenization_own.Own"]}, **tokenizer}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("step", STEPS)
def test_family_that_transformers_has_itself(step: str, text: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    """As Phi-3 is published."""
    plain = make_model(tmp_path / "plain", "phi3", layers=3)
    model = with_code(make_model(tmp_path / "model", "phi3", layers=3), tmp_path / "mark")
    outputs = []
    for path in (plain, model):
        recipe = write_recipe(tmp_path / "r.yaml", path, text, **STEPS[step])
        for command in ("plan", "run"):
            outcome = mkaq(
                command, recipe, *(("--output", tmp_path / f"run-{path.name}") * (command == "run"))
            )
            assert outcome.code == 0, outcome.err
            notes = [line for line in outcome.err.splitlines() if line.startswith("note: ")]
            assert len(notes) == (path == model)
            assert all("auto_map" in note and "config.json" in note and CONFIG in note for note in notes)
        outputs.append(tmp_path / f"run-{path.name}")
    assert tree(outputs[0] / "artifact").keys() == tree(outputs[1] / "artifact").keys()
    for file in outputs[1].rglob("*config.json"):
        assert not {"auto_map", "custom_pipelines"} & json.loads(file.read_text()).keys()
    assert (outputs[0] / "artifact" / "config.json").read_bytes() == (
        outputs[1] / "artifact" / "config.json"
    ).read_bytes()
    assert mkaq("verify", outputs[1] / "artifact", "--source", model).code == 0
    if step == "int8":
        loaded = AutoModelForCausalLM.from_pretrained(outputs[1] / "artifact", dtype=torch.float32)
        assert type(loaded).__module__ == "transformers.models.phi3.modeling_phi3"
    AutoTokenizer.from_pretrained(outputs[1] / "artifact")
    assert not (tmp_path / "mark").exists()


def test_tokenizer_is_read_as_the_artifact_will_have_it(tmp_path: Path) -> None:
    plain, model = BUILTIN["builtin:tiny-llama"], with_code(make_model(tmp_path / "m"), tmp_path / "mark")
    text = "To be, or not to be: that is the question."
    assert load_tokenizer(model)(text)["input_ids"] == load_tokenizer(plain)(text)["input_ids"]
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("command", ["run", "plan", "eval", "generate", "analyze"])
@pytest.mark.parametrize("what", ["family", "tokenizer"])
def test_code_that_would_be_needed_is_not_run(
    what: str, command: str, broken: Callable[[Damage], Path], text: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    tokenizer = {"tokenizer_class": "OwnTokenizer"} if what == "tokenizer" else {}
    path = broken(lambda folder: with_code(folder, mark, **tokenizer))
    if what == "family":
        edit_config(path, model_type="own")
    recipe = write_recipe(tmp_path / "r.yaml", path, text)
    lines = {"run": ("run", recipe, "--output", tmp_path / "run"), "plan": ("plan", recipe)}
    outcome = mkaq(*lines.get(command, (command, path, *(["To be"] * (command == "generate")))))
    assert not mark.exists()
    if (what, command) != ("tokenizer", "plan"):  # which reads no tokenizer
        assert outcome.code == 4 and "remote code" in outcome.err, outcome.err
        assert "trust_remote_code" not in outcome.err
    if command not in ("run", "plan"):
        one_message(outcome, 4, "auto_map")
