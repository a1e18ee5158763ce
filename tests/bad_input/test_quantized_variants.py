"""Variants of quantized formats, which have the same tensors and mean other weights: read, or refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mkaq.checkpoint.validate import open_checkpoint
from mkaq.formats.layer import dense_layer
from tests.bad_input.damage import change_tensors
from tests.bad_input.test_bad_quantized import change_parts, edit_quantization
from tests.runs import Mkaq, one_message, run_quietly
from tests.tiny import write_recipe

GPTQ: dict[str, dict[str, Any]] = {
    "marlin": {"checkpoint_format": "marlin", "format": "marlin"},
    "bitblas": {"checkpoint_format": "bitblas", "format": None},
    "old marlin": {"is_marlin_format": True},
    "another method": {"method": "qqq"},
    "words of 16 bits": {"pack_dtype": "int16"},
    "modules with settings of their own": {"dynamic": {"+:.*down_proj": {"bits": 8}}},
    "rotated": {"rotation": "hadamard"},
    "with an adapter": {"adapter": {"name": "lora"}},
    "only some modules": {"modules_in_block_to_quantize": [["self_attn.q_proj", "mlp.up_proj"]]},
}
INT8: dict[str, dict[str, Any]] = {
    "weights in float16": {"llm_int8_has_fp16_weight": True},
    "a layer left out": {"llm_int8_skip_modules": ["lm_head", "model.layers.1.mlp"]},
    "an ending left out": {"llm_int8_skip_modules": ["down_proj"]},
    "a part left out": {"llm_int8_skip_modules": ["self_attn"]},
    "a pattern left out": {"llm_int8_skip_modules": [".*"]},
    "nothing left out, by name": {"llm_int8_skip_modules": [""]},
}
NF4: dict[str, dict[str, Any]] = {
    "codes in bfloat16": {"bnb_4bit_quant_storage": "bfloat16"},
    "modules left out": {"modules_to_not_convert": "mlp.gate_proj"},
}
HARMLESS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "gptq": [
        ("off", {"lm_head": False, "dynamic": None, "rotation": None, "pack_dtype": "int32"}),
        ("not named", {"checkpoint_format": None, "format": None}),
        ("all modules", {"modules_in_block_to_quantize": [
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
            ["mlp.up_proj", "mlp.gate_proj"], ["mlp.down_proj"]]}),
    ],
    "int8": [("outer modules", {"llm_int8_skip_modules": ["lm_head", "model.embed_tokens", "vision_tower"]})],
    "nf4": [("as transformers writes it", {"bnb_4bit_quant_storage": "torch.uint8"})],
}  # fmt: skip
CASES = [("gptq", case, c) for case, c in GPTQ.items()] + [("int8", case, c) for case, c in INT8.items()]
CASES += [("nf4", case, changes) for case, changes in NF4.items()]
FINE = [(kind, case, changes) for kind, cases in HARMLESS.items() for case, changes in cases]


@pytest.fixture(scope="module")
def artifacts(whole: Path, model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = {"gptq": whole / "artifact"}
    for name, bits in (("int8", 8), ("nf4", 4)):
        folder = tmp_path_factory.mktemp(name)
        quantize = {"method": "bitsandbytes", "bits": bits}
        path = write_recipe(folder / "r.yaml", model, text, merge=None, quantize=quantize, evaluate=None)
        made[name] = run_quietly(path, folder / "run") / "artifact"
    return made


def edited(artifact: Path, folder: Path, **changes: Any) -> Path:
    """A copy with another quantization_config, and the same beside it."""
    path = shutil.copytree(artifact, folder)
    edit_quantization(**changes)(path)
    if (path / "quantize_config.json").is_file():
        config = json.loads((path / "config.json").read_text())["quantization_config"]
        (path / "quantize_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(("kind", "case", "changes"), CASES, ids=lambda value: str(value)[:30])
def test_variant_that_is_refused(
    kind: str, case: str, changes: dict[str, Any], artifacts: dict[str, Path], mkaq: Mkaq, tmp_path: Path
) -> None:
    path = edited(artifacts[kind], tmp_path / "artifact", **changes)
    one_message(mkaq("generate", path, "To be"), 3, "config.json", next(iter(changes)), "fix: ")


@pytest.mark.parametrize(("kind", "case", "changes"), FINE, ids=lambda value: str(value)[:30])
def test_what_changes_nothing_is_read(
    kind: str, case: str, changes: dict[str, Any], artifacts: dict[str, Path], tmp_path: Path
) -> None:
    open_checkpoint(edited(artifacts[kind], tmp_path / "artifact", **changes), quantized=True)


def test_version_2_is_read_as_what_it_is(artifacts: dict[str, Path], mkaq: Mkaq, tmp_path: Path) -> None:
    """Zero points are stored as they are: 8 in the place of 7 in every half byte."""
    first = artifacts["gptq"]
    second = edited(first, tmp_path / "v2", checkpoint_format="gptq_v2", format="gptq_v2")
    change_parts(".qzeros", lambda words: words + 0x11111111)(second)
    layers = [dense(path) for path in (first, second)]
    for name, tensor in layers[0].items():
        assert torch.equal(tensor, layers[1][name]), name
    line = ("--num-samples", 2, "--max-seq-length", 32)
    assert mkaq("eval", first, *line).out == mkaq("eval", second, *line).out


def dense(path: Path) -> dict[str, torch.Tensor]:
    """A layer of an artifact, its weights as they are meant."""
    opened = open_checkpoint(path, quantized=True)
    return dense_layer(opened.read_layer(1), opened.arch.linear_names, opened.quantization)


def swap_shape(state: torch.Tensor) -> torch.Tensor:
    """Says of a weight that it lies the other way round."""
    told = json.loads(bytes(state.tolist()))
    told["shape"] = told["shape"][::-1]
    return torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)


LAID_OUT: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], object]]] = {
    "int8 in the order of a kernel": (
        "int8",
        lambda t: t.update({n: t[n] * 0 + 2 for n in t if n.endswith("weight_format")}),
    ),
    "nf4 of another shape": (
        "nf4",
        lambda t: t.update({n: swap_shape(t[n]) for n in t if "bitsandbytes__" in n}),
    ),
}


@pytest.mark.parametrize("case", LAID_OUT)
def test_codes_that_lie_in_another_way(
    case: str, artifacts: dict[str, Path], mkaq: Mkaq, tmp_path: Path
) -> None:
    kind, change = LAID_OUT[case]
    path = shutil.copytree(artifacts[kind], tmp_path / "artifact")
    change_tensors(change)(path)
    one_message(mkaq("generate", path, "To be"), 4, "cannot be unpacked")


@pytest.mark.parametrize("both", [True, False])
def test_bitsandbytes_of_no_width(both: bool, artifacts: dict[str, Path], mkaq: Mkaq, tmp_path: Path) -> None:
    path = edited(artifacts["int8"], tmp_path / "artifact", load_in_8bit=both, load_in_4bit=both)
    one_message(mkaq("generate", path, "To be"), 4, "either load_in_8bit or load_in_4bit")
