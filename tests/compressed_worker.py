"""Loads checkpoints with transformers and compressed-tensors: a script of test_export_compressed.py.

usage: compressed_worker.py FOLDER...
Writes FOLDER.safetensors: the decoded weights, in float32, and `logits` for the token ids in FOLDER.ids.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
torch.set_num_threads(1)
for folder in map(Path, sys.argv[1:]):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():  # the first pass decodes the weights
        logits = model(load_file(f"{folder}.ids")["ids"], use_cache=False).logits
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in linears - {"lm_head"}}
    save_file({**weights, "logits": logits.contiguous()}, f"{folder}.safetensors")
    print(folder, len(weights), flush=True)
