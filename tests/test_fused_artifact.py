"""Artifacts of fusing by channels: every family, through the command line, and claims that are forged."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mkaq.checkpoint.validate import open_checkpoint
from mkaq.digests import digest_of
from mkaq.manifest import MANIFEST, manifest_schema, read_manifest
from mkaq.merge.cost import COEFFICIENTS
from mkaq.merge.origins import ORIGINS
from mkaq.merge.write import digest_layer
from mkaq.stages.merge import MergeRecord
from tests.runs import Mkaq, forge, run_quietly, tree
from tests.test_families import IDS, walk_logits
from tests.tiny import CHANNELS, FAMILIES, make_model, write_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
FUSABLE = [family for family in FAMILIES if family != "gemma2"]
SINGLE = "model.safetensors"


def small_recipe(path: Path, model: Path, text: Path, **sections: Any) -> Path:
    """A recipe that only merges, on 16 samples of 32 tokens."""
    calibration = {"dataset": "text", "path": str(text), "num_samples": 16, "max_seq_length": 32}
    plain: dict[str, Any] = {
        "calibration": calibration,
        "merge": CHANNELS,
        "quantize": None,
        "evaluate": None,
    }
    return write_recipe(path, model, text, **plain | sections)


@pytest.fixture(scope="module", params=FUSABLE)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A folder with a model of a family, a recipe and its finished run. Not to be changed."""
    folder = tmp_path_factory.mktemp(request.param)
    run_quietly(
        small_recipe(folder / "r.yaml", make_model(folder / "model", request.param), text), folder / "run"
    )
    return folder


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """The same with a Llama and two layers less. Not to be changed: copy its artifact first."""
    folder = tmp_path_factory.mktemp("fused")
    recipe = small_recipe(
        folder / "r.yaml", make_model(folder / "model"), text, merge={**CHANNELS, "layers": 2}
    )
    run_quietly(recipe, folder / "run")
    return folder


@pytest.fixture
def artifact(fused: Path, tmp_path: Path) -> Path:
    """An artifact to change."""
    return shutil.copytree(fused / "run" / "artifact", tmp_path / "artifact")


def merge_step(artifact: Path) -> MergeRecord:
    step = read_manifest(artifact).steps[0]
    assert isinstance(step, MergeRecord)
    return step


def test_artifact_loads_in_plain_transformers(made: Path) -> None:
    artifact = made / "run" / "artifact"
    theirs = AutoModelForCausalLM.from_pretrained(artifact)
    with torch.no_grad():
        logits = theirs(IDS, use_cache=False).logits
    assert torch.equal(logits, walk_logits(artifact, open_checkpoint(artifact).dtype))
    config = json.loads((artifact / "config.json").read_text())
    assert config["num_hidden_layers"] == len(theirs.model.layers) == 3
    groups = [sorted(map(int, layer.from_)) for layer in merge_step(artifact).layers]
    before = open_checkpoint(made / "model").hf_config.to_dict().get("layer_types")
    if before is not None:
        assert config["layer_types"] == [before[group[0]] for group in groups]


def test_manifest_tells_what_was_tried_and_the_cheapest_was_taken(made: Path) -> None:
    artifact = made / "run" / "artifact"
    step = merge_step(artifact)
    jsonschema.validate(json.loads((artifact / MANIFEST).read_text()), manifest_schema())
    pairs = {group.first: group.error for group in step.measured if group.layers == 2}
    assert pairs.keys() == {1, 2} and all(error > 0 for error in pairs.values())
    first = min(pairs, key=lambda start: pairs[start])
    groups = [sorted(map(int, layer.from_)) for layer in step.layers]
    assert [group for group in groups if len(group) > 1] == [[first, first + 1]]
    for layer in step.layers:
        assert sum(layer.from_.values()) == pytest.approx(1)
        assert layer.fused is not None and layer.fused.mlp.error <= layer.fused.mlp.error_before
    assert step.merges == []
    norm = step.final_norm
    assert norm is not None and 0.5 < norm.scale < 1 and norm.error < norm.error_before
    before, after = (load_file(path / SINGLE)["model.norm.weight"] for path in (made / "model", artifact))
    assert after.equal((before.double() * norm.scale).bfloat16())


def test_verify_fuses_again(made: Path, mkaq: Mkaq) -> None:
    outcome = mkaq("verify", made / "run" / "artifact", "--source", made / "model")
    assert outcome.code == 0, outcome.err
    assert "3 layers but for what was solved recomputed" in outcome.out
    assert "the errors of hidden states that the manifest says (merge; to 2% or 1e-05)" in outcome.out


def test_second_run_from_scratch_gives_the_same_bytes(made: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    outcome = mkaq("run", made / "r.yaml", "--output", tmp_path / "again")
    assert outcome.code == 0, outcome.err
    assert tree(tmp_path / "again" / "artifact") == tree(made / "run" / "artifact")


def sign_origins(artifact: Path, origins: Any) -> None:
    """Writes other origins under a manifest that fits them."""
    data = ("[\n" + ",\n".join(json.dumps(o, separators=(",", ":")) for o in origins) + "\n]\n").encode()
    (artifact / ORIGINS).write_bytes(data)

    def sign(manifest: Any) -> None:
        for entry in manifest["files"]:
            if entry["path"] == ORIGINS:
                entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for layer, origin in zip(manifest["steps"][0]["layers"], origins, strict=True):
            layer["fused"]["origins_sha256"] = digest_of(origin)

    forge(artifact, sign)


def test_signing_the_same_origins_is_no_forgery(fused: Path, artifact: Path, mkaq: Mkaq) -> None:
    sign_origins(artifact, json.loads((artifact / ORIGINS).read_text()))
    assert tree(artifact) == tree(fused / "run" / "artifact")
    assert mkaq("verify", artifact, "--source", fused / "model").code == 0


@pytest.mark.parametrize("kind", ["heads", "channels"])
def test_verify_finds_two_swapped_parts(kind: str, fused: Path, artifact: Path, mkaq: Mkaq) -> None:
    """As if another head or channel had been put in a place: the files agree, the source does not."""
    origins = json.loads((artifact / ORIGINS).read_text())
    every = ((new, part) for new, layer in enumerate(origins) for part in layer[kind].values())
    new, numbers = next((new, part) for new, part in every if len(part) > 1)
    numbers[0], numbers[1] = numbers[1], numbers[0]
    sign_origins(artifact, origins)
    assert mkaq("verify", artifact).code == 0
    outcome = mkaq("verify", artifact, "--source", fused / "model")
    assert outcome.code == 5 and f"model.layers.{new}." in outcome.err
    assert "is not what the recorded merge gives" in outcome.err


@pytest.mark.parametrize("new", [0, 1])
def test_verify_finds_a_forged_residual(new: int, fused: Path, artifact: Path, mkaq: Mkaq) -> None:
    def edit(manifest: Any) -> None:
        told = manifest["steps"][0]["layers"][new]["fused"]
        told["residual"] = told["residual"] * 0.9 + (0.001 if new == 0 else 0)

    forge(artifact, edit)
    assert mkaq("verify", artifact).code == 0
    outcome = mkaq("verify", artifact, "--source", fused / "model")
    assert outcome.code == 5 and f"layer {new} leaves an error of" in outcome.err


def sign_weights(artifact: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes layer 1 of an artifact under a manifest that fits it."""
    tensors, prefix = load_file(artifact / SINGLE), "model.layers.1."
    edit(tensors)
    save_file(tensors, artifact / SINGLE, metadata={"format": "pt"})
    data = (artifact / SINGLE).read_bytes()
    layer = {n.removeprefix(prefix): tensor for n, tensor in tensors.items() if n.startswith(prefix)}

    def sign(manifest: Any) -> None:
        for entry in manifest["files"]:
            if entry["path"] == SINGLE:
                entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        manifest["steps"][0]["layers"][1]["sha256"] = digest_layer(layer)

    forge(artifact, sign)


def test_verify_finds_another_solution(fused: Path, artifact: Path, mkaq: Mkaq) -> None:
    """`down_proj` follows from no record, but the error that it leaves does."""
    sign_weights(artifact, lambda t: t["model.layers.1.mlp.down_proj.weight"].mul_(0.5))
    assert mkaq("verify", artifact).code == 0
    outcome = mkaq("verify", artifact, "--source", fused / "model")
    assert outcome.code == 5 and "layer 1 leaves an error of" in outcome.err


def test_another_choice_that_computes_the_same_is_no_fault(fused: Path, artifact: Path, mkaq: Mkaq) -> None:
    """Two channels change places everywhere: what is chosen may differ from machine to machine."""

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        order = torch.tensor([1, 0, *range(2, 128)])
        for name in ("gate_proj", "up_proj", "down_proj"):
            key = f"model.layers.1.mlp.{name}.weight"
            weight = tensors[key]
            tensors[key] = (weight[:, order] if name == "down_proj" else weight[order]).contiguous()

    origins = json.loads((artifact / ORIGINS).read_text())
    numbers = next(iter(origins[1]["channels"].values()))
    numbers[0], numbers[1] = numbers[1], numbers[0]
    sign_origins(artifact, origins)
    sign_weights(artifact, swap)
    outcome = mkaq("verify", artifact, "--source", fused / "model")
    assert outcome.code == 0, outcome.err


def test_without_the_text_only_errors_go_unchecked(
    artifact: Path, fused: Path, text: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    """Another machine: origins are still checked against the source, and what was not is said."""
    forge(artifact, lambda m: m["recipe"]["calibration"].update(path=str(tmp_path / "nowhere.txt")))
    outcome = mkaq("verify", artifact, "--source", fused / "model")
    assert outcome.code == 0, outcome.err
    assert "2 layers but for what was solved recomputed" in outcome.out
    assert "not measured again: the calibration text is not here" in outcome.out


def test_averages_can_be_measured_too(text: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    """The family that cannot be fused: groups and coefficients by what they do to the hidden states."""
    model = make_model(tmp_path / "model", "gemma2")
    merge = {"layers": 2, "order": "measured", "coefficient": "measured", "protect": {"first": 1, "last": 0}}
    recipe = small_recipe(tmp_path / "r.yaml", model, text, merge=merge)
    outcome = mkaq("run", recipe, "--output", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    step = merge_step(tmp_path / "run" / "artifact")
    assert len(step.layers) == 2 and len(step.measured) == 3
    assert len({entry.coefficient for entry in step.merges}) == 1
    assert all(entry.coefficient in COEFFICIENTS and entry.similarity is None for entry in step.merges)
    verified = mkaq("verify", tmp_path / "run" / "artifact", "--source", model)
    assert verified.code == 0, verified.err
