"""Quantized checkpoints that lie about themselves."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bad_input.damage import UP, Damage, change_tensors
from tests.runs import Mkaq, one_message, run_quietly
from tests.tiny import edit_config, write_recipe


def edit_quantization(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"].update(changes)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def change_parts(ending: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    """Changes all tensors whose names end so."""
    return change_tensors(lambda t: t.update({n: edit(t[n]) for n in list(t) if n.endswith(ending)}))


ARTIFACTS: dict[str, tuple[str, Damage]] = {
    "unknown method": ("gptq", edit_quantization(quant_method="awq")),
    "no method": ("gptq", lambda f: edit_config(f, quantization_config={})),
    "other bits": ("gptq", edit_quantization(bits=8)),
    "no bits": ("gptq", edit_quantization(bits="x")),
    "other group size": ("gptq", edit_quantization(group_size=64)),
    "no group size": ("gptq", edit_quantization(group_size=0)),
    "group 10^6": ("gptq", change_parts(".g_idx", lambda t: t + 10**6)),
    "group -5": ("gptq", change_parts(".g_idx", lambda t: t - 5)),
    "scales are NaN": ("gptq", change_parts(".scales", lambda t: t * float("nan"))),
    "codes are floats": ("gptq", change_parts(".qweight", lambda t: t.float())),
    "codes are missing": ("gptq", change_tensors(lambda t: t.pop(UP.replace("weight", "qweight")))),
    "int8 as 4 bits": ("int8", edit_quantization(load_in_8bit=False, load_in_4bit=True)),
    "int8 threshold": ("int8", edit_quantization(llm_int8_threshold="x")),
    "int8 codes are floats": ("int8", change_parts("proj.weight", lambda t: t.float())),
    "code nf5": ("nf4", edit_quantization(bnb_4bit_quant_type="nf5")),
    "type load": ("nf4", edit_quantization(bnb_4bit_compute_dtype="load")),
    "state is no JSON": ("nf4", change_parts("bitsandbytes__nf4", lambda t: t * 0)),
    "scales too few": ("nf4", change_parts(".absmax", lambda t: t[:1].clone())),
    "table of NaN": ("nf4", change_parts(".quant_map", lambda t: t * float("nan"))),
}


@pytest.fixture(scope="module")
def artifacts(
    whole: Path, model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    made = {"gptq": whole / "artifact"}
    for name, bits in (("int8", 8), ("nf4", 4)):
        folder = tmp_path_factory.mktemp(name)
        sections = {"calibration": None, "merge": None, "evaluate": None}
        sections["quantize"] = {"method": "bitsandbytes", "bits": bits}
        path = write_recipe(folder / "r.yaml", model, text, **sections)
        made[name] = run_quietly(path, folder / "run") / "artifact"
    return made


@pytest.mark.parametrize("case", ARTIFACTS)
def test_quantized_checkpoint_that_lies(
    case: str, artifacts: dict[str, Path], mkaq: Mkaq, tmp_path: Path
) -> None:
    """An artifact of somebody else is a checkpoint like any other: not trusted, whatever it says."""
    method, damage = ARTIFACTS[case]
    path = shutil.copytree(artifacts[method], tmp_path / "artifact")
    assert mkaq("generate", path, "To be", "--max-new-tokens", 1).code == 0
    damage(path)
    outcome = mkaq("generate", path, "To be", "--max-new-tokens", 1)
    assert outcome.code in (3, 4), outcome.err
    one_message(outcome, outcome.code, str(path))
    one_message(mkaq("verify", path), 5)
