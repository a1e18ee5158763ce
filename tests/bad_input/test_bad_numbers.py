"""Models with numbers that are hard to work with: every stage does what it should, or says what it could not.

Each case runs end to end. Of all it is asserted that the run ends well, the artifact is smaller than the
source, it verifies, and what could not be done as asked is told, as a fallback or a note. `make test` takes
every fourth case, `make test-reliability` all.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mkaq.checkpoint.validate import open_checkpoint
from mkaq.manifest import Manifest, read_manifest
from tests.bad_input.damage import EMBED, UP, Damage, change_tensors
from tests.reliability.test_stops import EVERY
from tests.runs import Mkaq, Outcome
from tests.tiny import CHANNELS, PROTECT, make_model, write_recipe

Tensors = dict[str, torch.Tensor]
DOWN = UP.replace("up_proj", "down_proj")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GPTQ = {"method": "gptq", "bits": 4, "group_size": 32}
INT8 = {"method": "bitsandbytes", "bits": 8}
NF4 = {"method": "bitsandbytes", "bits": 4}
AVERAGE = {"layers": 1, **PROTECT}
TUNED = {"method": "layerwise", "steps": 2, "batch_size": 4}
BOTH = {"formats": ["safetensors", "gguf"]}
UNMEASURED = "groups measured on the samples they were built from, all there are"

# What can be made of a model; the last stage evaluates each.
STAGES: dict[str, dict[str, Any]] = {
    "average": {"merge": AVERAGE, "quantize": None, "export": BOTH},
    "fuse and tune": {"merge": CHANNELS, "recover": TUNED, "quantize": None},
    "gptq": {"merge": None, "quantize": GPTQ, "export": BOTH},
    "gptq, scattered": {"merge": None, "quantize": {**GPTQ, "sym": False, "desc_act": True}},
    "gptq, toward the source": {"merge": CHANNELS, "quantize": {**GPTQ, "target": "source"}},
    "int8": {"merge": None, "quantize": INT8},
    "nf4": {"merge": None, "quantize": NF4},
}
GPTQS = ("gptq", "gptq, scattered")
DEAD = "columns without input in {} module"
SCALE = "scales beyond float16 in {} module"


def layer(tensors: Tensors, number: int = 1) -> list[torch.Tensor]:
    """The linear layers of a layer."""
    return [tensors[name] for name in tensors if f".{number}." in name and name.split(".")[-2] in LINEARS]


def dead_channel(tensors: Tensors) -> None:
    """A channel that is 0 for every input, and yet is read."""
    for name in ("up_proj", "gate_proj"):
        tensors[UP.replace("up_proj", name)][5] = 0
    tensors[DOWN][:, 5] = 1.0


def converted(dtype: torch.dtype, *words: str) -> Callable[[Tensors], object]:
    """Gives another type to the tensors whose names hold one of the words."""
    return lambda t: t.update({name: t[name].to(dtype) for name in t if any(w in name for w in words)})


# What is done to the middle layer, and the fallbacks that each way of making a model then has.
NUMBERS: dict[str, tuple[Callable[[Tensors], object], dict[str, str]]] = {
    "a layer of zeros": (lambda t: [weight.zero_() for weight in layer(t)], {}),
    "attention that writes nothing": (lambda t: [weight.zero_() for weight in layer(t)[3:7]], {}),
    "a channel that is dead": (dead_channel, dict.fromkeys(GPTQS, DEAD.format(1))),
    "a norm of zeros, and so no input": (
        lambda t: [t[name].zero_() for name in t if ".1." in name and "layernorm" in name],
        dict.fromkeys(GPTQS, DEAD.format(7)),
    ),
    "weights all equal": (lambda t: [weight.fill_(0.03) for weight in layer(t)], {}),
    "a tiny column": (lambda t: t[DOWN][:, 3].fill_(1e-9), {}),
    "a matrix too small for float16": (
        lambda t: t[DOWN].mul_(1e-9),
        dict.fromkeys((*GPTQS, "int8"), SCALE.format(1)),
    ),
    "one weight of 10,000": (lambda t: t[DOWN][0, :1].fill_(1e4), {}),
    "one weight of 10,000 in float16": (
        lambda t: (converted(torch.float16, "")(t), t[DOWN][0, :1].fill_(1e4)),
        {},
    ),
    "float64": (converted(torch.float64, ""), {}),
    "two layers alike": (
        lambda t: t.update({n.replace(".0.", ".1."): t[n].clone() for n in t if ".0." in n}),
        {},
    ),
    "tokens all alike": (lambda t: t[EMBED].copy_(t[EMBED][:1].clone()), {}),
}
FEW: dict[str, tuple[str, ...]] = {  # where only some ways have anything to lose
    "float64": ("average", "gptq, scattered", "int8", "nf4"),
    "one weight of 10,000 in float16": ("gptq", "int8"),
}
CASES = [(case, way) for case in NUMBERS for way in STAGES if way in FEW.get(case, tuple(STAGES))]
CASES = CASES if EVERY == 1 else CASES[::4]


def made(mkaq: Mkaq, recipe: Path, model: Path, folder: Path) -> tuple[Outcome, Manifest]:
    """A run that must end well with a smaller artifact that verifies; what it told, and its manifest."""
    outcome = mkaq("run", recipe, "--output", folder)
    assert outcome.code == 0, outcome.err
    artifact = folder / "artifact"
    assert weights_size(artifact) < weights_size(model)
    verified = mkaq("verify", artifact, "--source", model)
    assert verified.code == 0, verified.err
    return outcome, read_manifest(artifact)


def weights_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize(("case", "way"), CASES)
def test_numbers_that_are_hard(
    case: str, way: str, broken: Callable[[Damage], Path], text: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    change, expected = NUMBERS[case]
    sections = dict(STAGES[way])
    if case == "float64" and way == "average":
        del sections["export"]  # GGUF has no float64
    model = broken(change_tensors(change))
    recipe = write_recipe(tmp_path / "r.yaml", model, text, **sections)
    _, manifest = made(mkaq, recipe, model, tmp_path / "run")
    told = manifest.fallbacks.get("quantize", [])
    if way == "gptq, toward the source":
        assert all(word.startswith(("columns without", "scales beyond")) for word in told)
    else:
        assert [word.partition(" (")[0].removesuffix("s") for word in told] == (
            [expected[way]] if way in expected else []
        )
    for stage, measured in manifest.evaluation.items():
        found = measured["perplexity"]["perplexity"]
        assert found is not None and math.isfinite(found), stage


# --- types -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["average", "gptq", "nf4"])
@pytest.mark.parametrize(
    ("wide", "words"),
    [
        (("embed", "layernorm"), "bfloat16"),  # most are bfloat16: float32 for all would be larger
        ((".0.", "mlp", "embed", "lm_head"), "float32"),
    ],
)
def test_weights_of_mixed_types(
    wide: tuple[str, ...],
    words: str,
    way: str,
    broken: Callable[[Damage], Path],
    text: Path,
    mkaq: Mkaq,
    tmp_path: Path,
) -> None:
    model = broken(change_tensors(converted(torch.float32, *wide)))
    recipe = write_recipe(tmp_path / "r.yaml", model, text, **STAGES[way])
    outcome, _ = made(mkaq, recipe, model, tmp_path / "run")
    assert outcome.err.count(f"model.dtype: auto is {words} for all of them") == 1
    assert "note: its weights are of several types (" in outcome.err
    saved = load_file(tmp_path / "run" / "artifact" / "model.safetensors")
    assert saved[EMBED].dtype == getattr(torch, words)


def test_float16_that_overflows_where_float32_does_not(
    broken: Callable[[Damage], Path], text: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    """Its layers give numbers beyond float16; only what multiplies in float16 cannot be evaluated."""

    def overflow(tensors: Tensors) -> None:
        converted(torch.float16, "")(tensors)
        for name in (UP, DOWN):
            tensors[name].mul_(3e3).clamp_(-6e4, 6e4)

    model = broken(change_tensors(overflow))
    for way in ("fuse and tune", "gptq, scattered", "int8"):
        recipe = write_recipe(tmp_path / "r.yaml", model, text, **STAGES[way])
        made(mkaq, recipe, model, tmp_path / way)
    recipe = write_recipe(tmp_path / "r.yaml", model, text, **STAGES["nf4"])
    outcome = mkaq("run", recipe, "--output", tmp_path / "run")
    assert outcome.code == 4 and "layer 1 gives NaN or infinity\n  fix: " in outcome.err
    assert not (tmp_path / "run" / "artifact").exists()
    mended = ("--set", "quantize.compute_dtype=bfloat16")
    assert mkaq("run", recipe, "--output", tmp_path / "run", *mended).code == 0


def test_scales_that_overflow_are_refused(
    broken: Callable[[Damage], Path], text: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    """bitsandbytes subtracts the mean of the scales, and their sum is infinite: its codes would be NaN."""
    model = broken(change_tensors(lambda t: t[UP].fill_(3e38)))
    recipe = write_recipe(tmp_path / "r.yaml", model, text, merge=None, quantize=NF4, evaluate=None)
    outcome = mkaq("run", recipe, "--output", tmp_path / "run")
    assert outcome.code == 3 and f"tensor {UP} has weights so large that" in outcome.err
    assert "fix: use quantize.double_quant: false" in outcome.err
    assert not (tmp_path / "run" / "artifact").exists()
    plain = ("--set", "quantize.double_quant=false")
    assert mkaq("run", recipe, "--output", tmp_path / "run", *plain).code == 0


# --- few samples, few layers, few tokens -------------------------------------------------------

ONE: dict[str, tuple[dict[str, Any], str | None]] = {
    "average by similarity": ({"merge": AVERAGE, "quantize": None}, None),
    "average as measured": (
        {"merge": {**CHANNELS, "fuse": "average"}, "quantize": None},
        UNMEASURED,
    ),
    "gptq": ({"merge": None, "quantize": GPTQ}, None),
    "gptq, scattered, 2 bits": (
        {"merge": None, "quantize": {**GPTQ, "bits": 2, "sym": False, "desc_act": True}},
        None,
    ),
}
TOO_FEW: dict[str, tuple[dict[str, Any], str]] = {
    "fuse": ({"merge": CHANNELS, "quantize": None}, "at least 8"),
    "tune": ({"merge": AVERAGE, "recover": TUNED, "quantize": None}, "at least 2"),
    "gptq toward the source": ({"merge": AVERAGE, "quantize": {**GPTQ, "target": "source"}}, "at least 8"),
}


def one_sample(text: Path) -> dict[str, Any]:
    return {"dataset": "text", "path": str(text), "num_samples": 1, "max_seq_length": 32}


@pytest.mark.parametrize("case", ONE)
def test_one_sample_is_enough(case: str, model: Path, text: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    sections, fallback = ONE[case]
    recipe = write_recipe(tmp_path / "r.yaml", model, text, **sections, calibration=one_sample(text))
    _, manifest = made(mkaq, recipe, model, tmp_path / "run")
    assert manifest.fallbacks == ({"merge": [fallback]} if fallback else {})


@pytest.mark.parametrize("case", TOO_FEW)
def test_one_sample_is_too_few(case: str, text: Path, refused: Callable[..., Outcome]) -> None:
    sections, words = TOO_FEW[case]
    refused(2, "calibration.num_samples", words, **sections, calibration=one_sample(text))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("merge", [{"layers": 1}, {"ratio": 0.5}, {"ratio": 0.99}, CHANNELS])
def test_too_few_layers_to_merge(
    merge: dict[str, Any], layers: int, refused: Callable[..., Outcome], tmp_path: Path
) -> None:
    path = make_model(tmp_path / "few", layers=layers)
    refused(
        2,
        f"of {layers} layers cannot be merged away",
        "and it takes two",
        merge=merge,
        model={"path": str(path)},
    )


@pytest.mark.parametrize("ratio", [1e-9, 0.99, 1 - 1e-12])
def test_ratio_that_leaves_no_layer_or_removes_none(ratio: float, refused: Callable[..., Outcome]) -> None:
    merge = {"ratio": ratio, "protect": {"first": 0, "last": 0}}
    refused(2, f"merge: {0 if ratio < 0.1 else 3} of 3 layers cannot be merged away", merge=merge)


@pytest.mark.parametrize("way", ["gptq", "gptq, scattered", "int8", "nf4"])
def test_model_of_one_layer(way: str, text: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", layers=1)
    recipe = write_recipe(tmp_path / "r.yaml", model, text, **STAGES[way])
    _, manifest = made(mkaq, recipe, model, tmp_path / "run")
    assert manifest.steps[-1].layers_after == 1 and manifest.fallbacks == {}


@pytest.mark.parametrize("way", ["average", "fuse and tune"])
def test_two_layers_become_one(way: str, text: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", layers=2)
    sections = dict(STAGES[way])
    sections["merge"] = {**sections["merge"], "protect": {"first": 0, "last": 0}}
    recipe = write_recipe(tmp_path / "r.yaml", model, text, **sections)
    made(mkaq, recipe, model, tmp_path / "run")
    assert open_checkpoint(tmp_path / "run" / "artifact").num_layers == 1
