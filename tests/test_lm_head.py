"""quantize.lm_head: the output layer is rounded against what the final norm gives it, and read back."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from safetensors.torch import load_file

from mkaq.checkpoint.validate import open_checkpoint, read_headers
from mkaq.errors import CheckpointError
from mkaq.formats.packing import unpack_linear
from mkaq.manifest import MANIFEST
from mkaq.quantize import head as head_module
from mkaq.quantize.gptq import gptq
from mkaq.walk.walk import LayerWalk
from tests.runs import Mkaq, forge, one_message, run_quietly
from tests.tiny import CHANNELS, edit_config, make_model, write_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
GPTQ = {"method": "gptq", "bits": 4, "group_size": 32, "lm_head": True}
FORMATS = {"formats": ["safetensors", "gguf", "compressed-tensors", "mlx"]}
HEAD = "lm_head"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "model", tie_word_embeddings=False)


@pytest.fixture(scope="module", params=["input", "source"])
def run(
    request: pytest.FixtureRequest, source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("run")
    sections = {"merge": CHANNELS, "quantize": {**GPTQ, "target": request.param}, "export": FORMATS}
    return run_quietly(write_recipe(folder / "recipe.yaml", source, text, **sections), folder / "run")


def logits(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    walk = LayerWalk(open_checkpoint(path, quantized=True), torch.device("cpu"))
    *_, (_, states) = walk.hidden_states(tokens)
    with walk.head() as head, torch.no_grad():
        return head(states)


def test_head_is_stored_as_codes_and_runs(run: Path, mkaq: Mkaq) -> None:
    artifact = run / "artifact"
    model = open_checkpoint(artifact, quantized=True)
    assert model.config["quantization_config"]["lm_head"] is True
    assert {n for n in model.tensors if n.startswith(HEAD)} == {
        f"{HEAD}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")
    }
    tokens = torch.arange(2, 34)[None]
    walk = LayerWalk(model, torch.device("cpu"))
    *_, (_, states) = walk.hidden_states(tokens)
    stored = {n.removeprefix(f"{HEAD}."): t for n, t in load_file(artifact / "model.safetensors").items()}
    weight = unpack_linear(stored, 4)
    with walk.final_norm() as norm, torch.no_grad():
        expected = norm(states).float() @ weight.T
    assert torch.allclose(logits(artifact, tokens), expected, atol=1e-3, rtol=1e-3)
    assert mkaq("eval", artifact, "--num-samples", 2, "--max-seq-length", 32).code == 0
    assert mkaq("generate", artifact, "To be", "--max-new-tokens", 3).code == 0


def test_every_format_holds_the_same_head(run: Path, mkaq: Mkaq) -> None:
    artifact, tokens = run / "artifact", torch.arange(2, 34)[None]
    packed = artifact / "compressed-tensors"
    assert open_checkpoint(packed, quantized=True).config["quantization_config"]["ignore"] == []
    assert torch.equal(logits(artifact, tokens), logits(packed, tokens))
    (file,) = (artifact / "gguf").iterdir()
    kinds = {tensor.name: tensor.tensor_type for tensor in GGUFReader(file).tensors}
    assert kinds["output.weight"] == GGMLQuantizationType.Q4_0
    assert f"{HEAD}.scales" in read_headers(artifact / "mlx")


def test_verify_measures_its_error(run: Path, source: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    done = mkaq("verify", run / "artifact", "--source", source)
    assert done.code == 0, done.err
    modules = json.loads((run / "artifact" / MANIFEST).read_text())["steps"][-1]["modules"]
    assert [m["name"] for m in modules].count(HEAD) == 1 and len(modules) == 3 * 7 + 1
    (head,) = (m for m in modules if m["name"] == HEAD)
    assert 0 < head["error"] < head["weight_error"] < 0.1 and head["ridge"] is None


def test_planned_bytes_are_those_written(source: Path, text: Path, tmp_path: Path, mkaq: Mkaq) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", source, text, merge=None, quantize=GPTQ)
    planned = json.loads(mkaq("plan", recipe, "--json").out)["stages"][-1]["bytes"]
    done = mkaq("run", recipe, "--output", tmp_path / "run")
    assert done.code == 0, done.err
    assert open_checkpoint(tmp_path / "run" / "artifact", quantized=True).nbytes == planned
    assert "lm_head" in done.out


def test_rows_in_pieces_give_what_all_rows_give(
    source: Path, text: Path, tmp_path: Path, mkaq: Mkaq, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(name: str) -> dict[str, torch.Tensor]:
        recipe = write_recipe(tmp_path / "r.yaml", source, text, merge=None, quantize=GPTQ)
        assert mkaq("run", recipe, "--output", tmp_path / name).code == 0
        return load_file(tmp_path / name / "artifact" / "model.safetensors")

    whole = made("whole")
    monkeypatch.setattr(head_module, "ROWS", 1024)
    pieces = made("pieces")
    assert all(torch.equal(whole[n], pieces[n]) for n in whole if n.startswith(HEAD))


def test_rounding_is_against_the_normed_states(source: Path, text: Path, tmp_path: Path, mkaq: Mkaq) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", source, text, merge=None, quantize=GPTQ)
    assert mkaq("run", recipe, "--output", tmp_path / "run").code == 0
    artifact = tmp_path / "run" / "artifact"
    (file,) = (tmp_path / "run" / "calibrate").glob("*.safetensors")
    (tokens,) = load_file(file).values()
    walk = LayerWalk(open_checkpoint(artifact, quantized=True), torch.device("cpu"))
    *_, (_, states) = walk.hidden_states(tokens)
    with walk.final_norm() as norm, torch.no_grad():
        normed = norm(states).flatten(0, 1).float()
    weight = load_file(source / "model.safetensors")[f"{HEAD}.weight"].float()
    tensors = load_file(artifact / "model.safetensors")
    stored = {n.removeprefix(f"{HEAD}."): t for n, t in tensors.items() if n.startswith(HEAD)}

    def error(quantized: torch.Tensor) -> float:
        missed, whole = ((normed @ matrix.T).square().sum() for matrix in (weight - quantized, weight))
        return float(missed / whole)

    head = json.loads((artifact / MANIFEST).read_text())["steps"][-1]["modules"][-1]
    assert error(unpack_linear(stored, 4)) == pytest.approx(head["error"], rel=0.05)
    unaware = gptq(weight, torch.eye(weight.shape[1]), bits=4, group_size=32).weight
    assert head["error"] < 0.8 * error(unaware)


def test_a_tied_head_is_refused_before_work(text: Path, tmp_path: Path, mkaq: Mkaq) -> None:
    tied = make_model(tmp_path / "tied", tie_word_embeddings=True)
    recipe = write_recipe(tmp_path / "r.yaml", tied, text, quantize=GPTQ)
    one_message(mkaq("run", recipe, "--output", tmp_path / "run"), 3, "embedding", "quantize.lm_head")


def test_a_config_that_contradicts_itself_is_refused(run: Path, tmp_path: Path) -> None:
    model = shutil.copytree(
        run / "artifact", tmp_path / "model", ignore=shutil.ignore_patterns("*-*", "gguf")
    )
    edit_config(model, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        open_checkpoint(model, quantized=True)
    edit_config(model, tie_word_embeddings=False)
    config = json.loads((model / "config.json").read_text())
    edit_config(model, quantization_config={**config["quantization_config"], "lm_head": False})
    (model / "quantize_config.json").unlink()
    with pytest.raises(CheckpointError, match=HEAD):
        open_checkpoint(model, quantized=True)


def test_a_forged_error_is_caught(run: Path, source: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    artifact = shutil.copytree(run / "artifact", tmp_path / "artifact")

    def shrink(manifest: Any) -> None:
        manifest["steps"][-1]["modules"][-1]["weight_error"] *= 0.9

    forge(artifact, shrink)
    one_message(mkaq("verify", artifact, "--source", source), 5, f"{HEAD} has a weight error of")
