"""A stored output layer where config.json says that it is the embedding: what it holds decides."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mkaq.checkpoint.validate import open_checkpoint
from mkaq.walk.whole_model import whole_model
from tests.bad_input.damage import EMBED, SINGLE, change_tensors
from tests.runs import Mkaq, one_message
from tests.tiny import PROTECT, edit_config, make_model, write_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
HEAD = "lm_head.weight"
STEPS: dict[str, dict[str, Any]] = {
    "merge": {"quantize": None},
    "recover": {"quantize": None, "recover": {"method": "layerwise", "steps": 1}},
    "gptq": {},
    "nf4": {"quantize": {"method": "bitsandbytes"}},
}


def tied(folder: Path, head: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A tied model that stores a head beside its embedding all the same."""
    make_model(folder, layers=3, tie_word_embeddings=True)
    change_tensors(lambda tensors: tensors.update({HEAD: head(tensors[EMBED])}))(folder)
    return folder


def other(embedding: torch.Tensor) -> torch.Tensor:
    """Another head: one weight is different, in the last piece that is compared."""
    head = embedding.clone()
    head[-1, -1] += 1
    return head


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=torch.tensor([[5, 6, 7]])).logits)


def test_head_that_is_the_embedding_is_dropped(tmp_path: Path) -> None:
    source = open_checkpoint(tied(tmp_path, torch.clone))
    assert HEAD not in source.tensors and source.hf_config.tie_word_embeddings and not source.remarks
    assert source.config == json.loads((tmp_path / "config.json").read_text())


def test_head_of_its_own_is_kept(tmp_path: Path) -> None:
    source = open_checkpoint(tied(tmp_path, other))
    assert HEAD in source.tensors and HEAD in source.dense_shapes
    assert source.config["tie_word_embeddings"] is False and source.hf_config.tie_word_embeddings is False
    assert len(source.remarks) == 1 and HEAD in source.remarks[0]
    model = whole_model(source, torch.device("cpu"), torch.float32)
    assert torch.equal(model.lm_head.weight, load_file(tmp_path / SINGLE)[HEAD].float())
    with torch.no_grad():
        ours = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    torch.testing.assert_close(ours, logits(tmp_path))


@pytest.mark.parametrize("change", [lambda t: t.float(), lambda t: t[:-1].clone(), lambda t: t.int()])
def test_head_of_another_type_or_shape_is_not_compared(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], mkaq: Mkaq
) -> None:
    path = tied(tmp_path / "model", change)
    outcome = mkaq("eval", path, "--num-samples", 2, "--max-seq-length", 32)
    if outcome.code:
        one_message(outcome, outcome.code, HEAD)
        assert outcome.code in (3, 4)
    else:
        assert HEAD in open_checkpoint(path).tensors


@pytest.mark.parametrize("step", STEPS)
def test_every_stage_keeps_a_head_of_its_own(step: str, tmp_path: Path, text: Path, mkaq: Mkaq) -> None:
    path, sections = tied(tmp_path / "model", other), {"evaluate": None, **STEPS[step]}
    recipe = write_recipe(tmp_path / "r.yaml", path, text, merge={"layers": 1, **PROTECT}, **sections)
    outcome = mkaq("run", recipe, "--output", tmp_path / "run")
    assert outcome.code == 0 and outcome.err.count("lm_head.weight is not the embedding") == 1, outcome.err
    configs = list((tmp_path / "run").glob("*/config.json"))
    assert {"merge", "artifact"} <= {config.parent.name for config in configs}
    for config in configs:
        assert json.loads(config.read_text())["tie_word_embeddings"] is False
        stored = load_file(config.parent / SINGLE)[HEAD]
        assert torch.equal(stored, load_file(path / SINGLE)[HEAD])
    assert mkaq("verify", tmp_path / "run" / "artifact", "--source", path).code == 0
    if step == "merge":
        ours = whole_model(open_checkpoint(tmp_path / "run" / "artifact"), torch.device("cpu"), torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(
                ours(input_ids=torch.tensor([[5, 6, 7]])).logits, logits(tmp_path / "run" / "artifact")
            )


def test_family_that_ties_unless_told_otherwise(tmp_path: Path) -> None:
    make_model(tmp_path, "gemma2", layers=2)
    edit_config(tmp_path, tie_word_embeddings=None)
    change_tensors(lambda tensors: tensors.update({HEAD: other(tensors[EMBED])}))(tmp_path)
    assert open_checkpoint(tmp_path).config["tie_word_embeddings"] is False
