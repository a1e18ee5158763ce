"""The joint target: what is rounded is first solved toward the source, and mends what merging left."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mkaq.checkpoint.output import Output
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.fit.hold_out import hold_out
from mkaq.manifest import MANIFEST, read_manifest
from mkaq.progress import Progress
from mkaq.quantize.gptq_layers import quantize_gptq
from mkaq.quantize.joint import JointTarget
from mkaq.quantize.solved import GptqModule
from mkaq.stages.quantize import GptqSection, QuantizeRecord
from mkaq.walk.walk import LayerWalk
from tests.runs import Mkaq, one_message
from tests.tiny import PROTECT, make_model, write_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
SINGLE = "model.safetensors"
TOKENS = torch.randint(2, 4096, (16, 32), generator=torch.Generator().manual_seed(1))
OTHERS = torch.randint(2, 4096, (8, 32), generator=torch.Generator().manual_seed(2))
OUTPUT_ROLES = ("self_attn.o_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: make_model(folder / family, family) for family in ("llama", "qwen2", "phi3")}


@pytest.fixture(params=["llama", "qwen2", "phi3"])
def model(request: pytest.FixtureRequest, models: dict[str, Path]) -> Path:
    return models[request.param]


def last_state(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    *_, (_, states) = LayerWalk(open_checkpoint(path, quantized=True), CPU).hidden_states(tokens)
    return states


def distance(path: Path, source: Path, tokens: torch.Tensor = OTHERS) -> float:
    """Mean over tokens of |output - source|^2 / |source|^2, after the last layer."""
    expected = last_state(source, tokens)
    error = (last_state(path, tokens) - expected).square().sum(-1) / expected.square().sum(-1)
    return float(error.mean())


def quantize(model: Path, folder: Path, *, joint: bool, **settings: Any) -> list[GptqModule]:
    """Quantizes a model that was not merged."""
    folder.mkdir()
    checkpoint = open_checkpoint(model)
    target = (
        JointTarget(LayerWalk(checkpoint, CPU), [[i] for i in range(4)], hold_out(TOKENS)) if joint else None
    )
    section = GptqSection(method="gptq", group_size=32, **settings)
    options, config = section.options(), section.config(torch.bfloat16)
    output = Output(torch.bfloat16, 10**9, Progress(quiet=True))
    return quantize_gptq(LayerWalk(checkpoint, CPU), TOKENS, options, config, folder, output, target).modules


def test_eight_bits_of_an_unmerged_model_stay_with_the_source(model: Path, tmp_path: Path) -> None:
    modules = quantize(model, tmp_path / "joint", joint=True, bits=8)
    assert distance(tmp_path / "joint", model) < 1e-3
    first = modules[0].name.rpartition(".self_attn")[0]
    assert first == "model.layers.0" and len(modules) == 4 * len(open_checkpoint(model).arch.linear_names)
    assert all(module.ridge is None for module in modules if not module.name.endswith(OUTPUT_ROLES))


def test_few_bits_come_nearer_to_the_source_on_the_calibration_tokens(model: Path, tmp_path: Path) -> None:
    for joint in (False, True):
        modules = quantize(model, tmp_path / str(joint), joint=joint, bits=2)
        solved = [module for module in modules if module.ridge is not None]
        assert bool(solved) == joint
        assert all(module.name.endswith(OUTPUT_ROLES) and module.ridge > 0 for module in solved)
    assert distance(tmp_path / "True", model, TOKENS) < 0.6 * distance(tmp_path / "False", model, TOKENS)


def test_first_attention_has_nothing_to_mend(model: Path, tmp_path: Path) -> None:
    """What reaches its o_proj is the source's but for rounding; on 8 bits the weight is hardly moved."""
    for joint in (False, True):
        quantize(model, tmp_path / str(joint), joint=joint, bits=8)
    name = "model.layers.0.self_attn.o_proj.weight"
    weights = [
        LayerWalk(open_checkpoint(tmp_path / str(joint), quantized=True), CPU).layer_tensors(0)[name[15:]]
        for joint in (False, True)
    ]
    before = load_file(model / SINGLE)[name].float()
    moved = [float((w - before).norm() / before.norm()) for w in weights]
    assert max(moved) < 0.02


@pytest.mark.parametrize(
    ("family", "fuse"), [("llama", "average"), ("qwen2", "average"), ("phi3", "channels")]
)
def test_merged_model_is_mended_while_it_is_rounded(
    family: str, fuse: str, models: dict[str, Path], text: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    model, folder = models[family], tmp_path / "run"
    recipe = write_recipe(
        tmp_path / "r.yaml",
        model,
        text,
        calibration={"dataset": "text", "path": str(text), "num_samples": 16, "max_seq_length": 32},
        merge={"layers": 2, **PROTECT, "fuse": fuse, "coefficient": None},
        quantize={"method": "gptq", "bits": 8, "group_size": 32},
        evaluate=None,
    )
    seen, unseen = {}, {}
    for target in ("source", "input"):
        outcome = mkaq("run", recipe, "--output", folder, "--set", f"quantize.target={target}")
        assert outcome.code == 0, outcome.err
        assert ("merge: unchanged, kept" in outcome.err) == (target == "input")
        assert "quantize: done" in outcome.err
        verified = mkaq("verify", folder / "artifact", "--source", model)
        assert verified.code == 0, verified.err
        assert "quantized modules have the weight error" in verified.out

        step = read_manifest(folder / "artifact").steps[-1]
        assert isinstance(step, QuantizeRecord) and step.settings["target"] == target
        raw = json.loads((folder / "artifact" / MANIFEST).read_text())["steps"][-1]["modules"]
        assert all("ridge" in module for module in raw)
        norms = [load_file(folder / s / SINGLE)["model.norm.weight"] for s in ("merge", "artifact")]
        assert (step.final_norm is not None) == (target == "source")
        scale = step.final_norm.scale if step.final_norm else 1.0
        assert norms[1].equal((norms[0].double() * scale).bfloat16())
        solved = {module.name for module in step.modules if module.ridge is not None}
        assert all(name.endswith(OUTPUT_ROLES) for name in solved)
        if fuse == "average":  # fusing has solved the same already
            solved &= {f"model.layers.1.{writer}" for writer in OUTPUT_ROLES}
        assert bool(solved) == (target == "source")
        tokens = load_file(folder / "calibrate" / "calibration.safetensors")["input_ids"]
        seen[target], seen["merge"] = (distance(folder / s, model, tokens) for s in ("artifact", "merge"))
        unseen[target] = distance(folder / "artifact", model)
    assert seen["input"] == pytest.approx(seen["merge"], rel=0.02)  # 8 bits: nothing but rounding
    if fuse == "average":
        assert seen["source"] < 0.6 * seen["input"]
        assert unseen["source"] < 0.85 * unseen["input"]  # 0.8: unseen text is random, calibration a quarter
    else:
        assert seen["source"] == pytest.approx(seen["input"], rel=0.2)


def test_family_that_normalizes_what_it_writes_has_no_joint_target(
    text: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    """It was quantized plainly, and the manifest said `source`."""
    model = make_model(tmp_path / "model", "gemma2")
    quantize = {"method": "gptq", "bits": 8, "group_size": 32}
    recipe = write_recipe(tmp_path / "r.yaml", model, text, merge=None, quantize=quantize, evaluate=None)
    for command in ("plan", "run"):
        refused = mkaq(command, recipe, "--output", tmp_path / "run", "--set", "quantize.target=source")
        one_message(refused, 3, "quantize.target: source: gemma2 normalizes", "fix: use target: input")
    outcome = mkaq("run", recipe, "--output", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    step = read_manifest(tmp_path / "run" / "artifact").steps[-1]
    assert isinstance(step, QuantizeRecord) and all(module.ridge is None for module in step.modules)
    assert mkaq("verify", tmp_path / "run" / "artifact", "--source", model).code == 0
