"""Every family: the walk is the forward pass; merge, both quantizers, reload, generation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mkaq.checkpoint.validate import open_checkpoint
from mkaq.generate.stream import stream
from mkaq.walk.walk import LayerWalk
from mkaq.walk.whole_model import whole_model
from tests.runs import Outcome
from tests.tiny import FAMILIES, PROTECT, SIMILAR, make_model

CPU = torch.device("cpu")
IDS = torch.randint(2, 4096, (3, 40), generator=torch.Generator().manual_seed(1))
QUANTIZERS: dict[str, dict[str, Any] | None] = {
    "merge": None,
    "gptq": {"method": "gptq", "bits": 4, "group_size": 32},
    "int8": {"method": "bitsandbytes", "bits": 8},
    "nf4": {"method": "bitsandbytes", "bits": 4},
    "fp4-single": {"method": "bitsandbytes", "bits": 4, "quant_type": "fp4", "double_quant": False},
}


@pytest.fixture(scope="module", params=FAMILIES)
def model_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp(request.param) / "model", request.param)


def walk_logits(path: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    walk = LayerWalk(open_checkpoint(path, quantized=True), CPU, dtype)
    *_, (_, hidden_states) = walk.hidden_states(IDS)
    with walk.head() as head, torch.no_grad():
        return head(hidden_states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_walk_is_the_forward_pass(model_path: Path, dtype: torch.dtype) -> None:
    reference = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype)
    with torch.no_grad():
        expected = reference(IDS, output_hidden_states=True, use_cache=False)
    walk = LayerWalk(open_checkpoint(model_path), CPU, dtype)
    last = walk.num_layers - 1
    for index, hidden_states in walk.hidden_states(IDS):
        if index < last:  # transformers puts the last state through the final norm
            assert torch.equal(hidden_states, expected.hidden_states[index + 1]), index
    assert torch.equal(walk_logits(model_path, dtype), expected.logits)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_artifact_reloads_and_generates(
    model_path: Path,
    quantizer: str,
    recipe: Callable[..., Path],
    mkaq: Callable[..., Outcome],
    tmp_path: Path,
) -> None:
    path = recipe(
        model={"path": str(model_path)},
        merge={"layers": 2, **PROTECT},
        quantize=QUANTIZERS[quantizer],
    )
    done = mkaq("run", path, "--output", tmp_path / "run", "--device", "cpu")
    assert done.code == 0, done.err
    artifact = tmp_path / "run" / "artifact"
    verified = mkaq("verify", artifact, "--source", model_path)
    assert verified.code == 0, verified.err

    checkpoint = open_checkpoint(artifact, quantized=True)
    ours = whole_model(checkpoint, CPU, checkpoint.dtype)
    with torch.no_grad():
        logits = ours(IDS, use_cache=False).logits
    assert torch.equal(logits, walk_logits(artifact, checkpoint.dtype))
    new = list(stream(ours, IDS[:1], 8, set()))
    if quantizer != "gptq":  # plain transformers; GPTQ's reload is in test_loader.py, where GPTQModel lives
        theirs = AutoModelForCausalLM.from_pretrained(artifact)
        with torch.no_grad():
            assert torch.equal(theirs(IDS, use_cache=False).logits, logits)
        told = theirs.generate(IDS[:1], max_new_tokens=8, do_sample=False, use_cache=True, eos_token_id=4095)
        assert told[0, IDS.shape[1] :].tolist() == new


def test_per_layer_lists_are_sliced(
    model_path: Path, recipe: Callable[..., Path], mkaq: Callable[..., Outcome], tmp_path: Path
) -> None:
    path = recipe(model={"path": str(model_path)}, merge={"layers": 1, **SIMILAR}, quantize=None)
    assert mkaq("run", path, "--output", tmp_path / "run").code == 0
    config = json.loads((tmp_path / "run" / "artifact" / "config.json").read_text())
    manifest = json.loads((tmp_path / "run" / "artifact" / "mkaq-manifest.json").read_text())
    kept = [min(map(int, layer["from"])) for layer in manifest["steps"][0]["layers"]]
    before = open_checkpoint(model_path).hf_config.to_dict().get("layer_types")
    assert config["num_hidden_layers"] == 3
    if before is not None:
        assert config["layer_types"] == [before[index] for index in kept]
