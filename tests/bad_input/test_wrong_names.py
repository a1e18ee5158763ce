"""Tensors with the names of another kind of model: the message says of which, and what to do helps."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mkaq.checkpoint.validate import open_checkpoint
from tests.bad_input.damage import EMBED, SINGLE, UP, Damage, change_tensors
from tests.runs import Mkaq, Outcome, one_message
from tests.tiny import PROTECT, edit_config, make_model, write_recipe


def renamed(change: Callable[[str], str], drop_head: bool = True) -> Damage:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        old = dict(tensors)
        tensors.clear()
        tensors.update({change(n): t for n, t in old.items() if not (drop_head and n == "lm_head.weight")})

    return change_tensors(edit)


def classifier(folder: Path) -> None:
    change_tensors(lambda t: t.update({"score.weight": t.pop("lm_head.weight")[:2].clone()}))(folder)
    edit_config(folder, architectures=["LlamaForSequenceClassification"])


def adapter(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


CASES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "base model": (
        renamed(lambda name: name.removeprefix("model.")),
        ("embed_tokens.weight is a name of a base model without a head", "start from the causal language"),
    ),
    "classifier": (
        classifier,
        ("score.weight", "a classifier (LlamaForSequenceClassification)", "start from"),
    ),
    "LoRA": (renamed(lambda name: f"base_model.model.{name}"), ("an adapter", "merge_and_unload")),
    "LoRA alone": (adapter, ("adapter_config.json", "not a whole model", "merge_and_unload")),
    "wrapper": (renamed(lambda name: f"module.{name}"), ("a wrapper", "fix: take the model out")),
    "compiled": (renamed(lambda name: f"_orig_mod.{name}", False), ("a wrapper",)),
    "original": (
        renamed(lambda n: n.replace("model.layers", "layers").replace("self_attn.q_proj", "attention.wq")),
        ("the original format of Llama", "fix: "),
    ),
    "images": (
        renamed(lambda name: f"language_model.{name}"),
        ("a model of more than text", "text-only"),
    ),
    "quantized": (
        change_tensors(lambda t: t.update({UP.replace("weight", "qweight"): t.pop(UP).int()})),
        ("up_proj.qweight is a name of quantized weights", "quantization_config"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_names_tell_the_cause(
    case: str, broken: Callable[[Damage], Path], refused: Callable[..., Outcome]
) -> None:
    damage, words = CASES[case]
    path = broken(damage)
    refused(4, str(path), *words, model={"path": str(path)})


def test_what_to_do_with_a_tied_base_model_helps(tmp_path: Path, mkaq: Mkaq, text: Path) -> None:
    path = make_model(tmp_path / "model", layers=3, tie_word_embeddings=True)
    renamed(lambda name: name.removeprefix("model."))(path)
    edit_config(path, architectures=["LlamaModel"])
    recipe = write_recipe(tmp_path / "r.yaml", path, text)
    one_message(
        mkaq("plan", recipe), 4, "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(another)"
    )
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(tmp_path / "another")
    source = open_checkpoint(tmp_path / "another")
    assert EMBED in source.tensors and source.num_layers == 3


@pytest.mark.parametrize("merge", [{"layers": 1, **PROTECT}, None])
def test_int8_of_a_weight_beyond_float16_names_it(
    merge: object, broken: Callable[[Damage], Path], text: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    name = UP.replace("layers.1", "layers.0")  # the first layer, which is not merged
    path = broken(change_tensors(lambda t: t[name][0, :1].fill_(1e5)))
    quantize = {"method": "bitsandbytes", "bits": 8}
    recipe = write_recipe(tmp_path / "r.yaml", path, text, merge=merge, quantize=quantize, evaluate=None)
    outcome = mkaq("run", recipe, "--output", tmp_path / "run")
    assert outcome.code == 3
    where = (tmp_path / "run" / "merge").resolve() / SINGLE if merge else path / SINGLE
    for words in (
        f"mkaq: {where}: tensor {name} has weights beyond float16",
        "fix: use quantize.bits: 4, or",
    ):
        assert words in outcome.err
    for fix in ("quantize.bits=4", "quantize.method=gptq"):  # what it says helps
        small = ("--set", "quantize.group_size=32", "--set", "calibration.max_seq_length=32")
        line = ("--set", fix, *(small if "gptq" in fix else ()))
        assert mkaq("run", recipe, "--output", tmp_path / "run", *line).code == 0, fix
