"""Checkpoints that say one thing twice, and not the same."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mkaq.checkpoint.validate import open_checkpoint
from tests.bad_input.damage import Damage
from tests.bad_input.test_bad_quantized import edit_quantization
from tests.runs import Mkaq, Outcome, one_message
from tests.tiny import edit_config, make_model

ROPE = {"rope_theta": 1e4, "rope_type": "default"}
LINEAR = {"rope_type": "linear", "factor": 2.0}
DIFFERENT: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "class": ({"architectures": ["MistralForCausalLM"]}, ("architectures", "model_type", "'llama'")),
    "theta": ({"rope_parameters": ROPE, "rope_theta": 5e5}, ("rope_theta", "500000.0", "10000.0")),
    "factor": (
        {"rope_parameters": {**ROPE, **LINEAR}, "rope_theta": 1e4, "rope_scaling": {**LINEAR, "factor": 4.0}},
        ("factor", "4.0", "2.0"),
    ),
    "theta that would be lost": (
        {"rope_parameters": {**LINEAR, "rope_theta": 5e5}, "rope_scaling": LINEAR},
        ("rope_theta", "None", "500000.0"),
    ),
}
SAME: dict[str, dict[str, Any]] = {
    "class in other letters": {"architectures": ["LLaMAForCausalLM"]},
    "theta": {"rope_parameters": ROPE, "rope_theta": 1e4},
    "scaling": {"rope_parameters": {**LINEAR, "rope_theta": 1e4}, "rope_theta": 1e4, "rope_scaling": LINEAR},
    "as it was written before": {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": LINEAR},
    "types, of which the tensors' own counts": {"dtype": "float32", "torch_dtype": "float16"},
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_config_that_says_two_things(
    case: str, broken: Callable[[Damage], Path], refused: Callable[..., Outcome]
) -> None:
    changes, words = DIFFERENT[case]
    path = broken(lambda folder: edit_config(folder, **changes))
    refused(4, str(path), *words, "fix: correct", model={"path": str(path)})


@pytest.mark.parametrize("case", SAME)
def test_config_that_says_one_thing_twice(case: str, broken: Callable[[Damage], Path]) -> None:
    path = broken(lambda folder: edit_config(folder, **SAME[case]))
    assert open_checkpoint(path).num_layers == 3


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3"])
def test_what_transformers_writes_says_nothing_twice(family: str, tmp_path: Path) -> None:
    assert open_checkpoint(make_model(tmp_path, family, layers=2)).num_layers == 2


def test_total_size_of_the_index_is_not_believed(tmp_path: Path) -> None:
    path = make_model(tmp_path, shard_size="200KB")
    index = path / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    size = open_checkpoint(path).nbytes
    index.write_text(json.dumps({**data, "metadata": {"total_size": 7}}))
    assert open_checkpoint(path).nbytes == size


@pytest.mark.parametrize(
    "changes", [{"bits": 8}, {"group_size": 64}, {"sym": False}, {"checkpoint_format": "gptq_v2"}]
)
def test_quantize_config_that_says_something_else(
    changes: dict[str, Any], whole: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    path = shutil.copytree(whole / "artifact", tmp_path / "artifact")
    data = json.loads((path / "quantize_config.json").read_text())
    (path / "quantize_config.json").write_text(json.dumps(data | changes))
    outcome = mkaq("generate", path, "To be", "--max-new-tokens", 1)
    one_message(outcome, 4, "quantize_config.json says", *changes)


def test_checkpoint_format_that_is_named_twice(whole: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    path = shutil.copytree(whole / "artifact", tmp_path / "artifact")
    edit_quantization(format="gptq_v2")(path)
    one_message(mkaq("generate", path, "To be"), 4, "checkpoint_format 'gptq' and format 'gptq_v2'")
