"""Loads checkpoints in plain transformers, in an environment without mkaq: a script of test_loader.py.

usage: load_artifacts.py FOLDER...
Writes FOLDER/.logits.safetensors for the token ids in FOLDER/.ids.safetensors.
"""

import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def main() -> None:
    assert importlib.util.find_spec("mkaq") is None, "mkaq is installed here"
    for folder in map(Path, sys.argv[1:]):
        ids = load_file(folder / ".ids.safetensors")["ids"]
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits.float()
        new = model.generate(ids[:1], max_new_tokens=6, do_sample=False, use_cache=True, eos_token_id=4095)
        with (
            torch.no_grad()
        ):  # the same tokens at once, without the cache: equal logits up to the kernel's rounding
            whole = model(new, use_cache=False).logits.float()
            cached = model(
                new[:, -1:], past_key_values=model(new[:, :-1], use_cache=True).past_key_values
            ).logits
        assert torch.allclose(cached[0, -1].float(), whole[0, -1], atol=0.05 * whole.std().item()), folder
        save_file({"logits": logits, "new": new}, folder / ".logits.safetensors")
        print(folder, type(model.model.layers[0].mlp.down_proj).__name__, flush=True)


main()
