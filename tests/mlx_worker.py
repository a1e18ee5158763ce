"""Loads folders with mlx-lm: a script of test_export_mlx.py, in an environment of its own.

usage: mlx_worker.py FOLDER...
Writes FOLDER.safetensors: the decoded weights, in float32, and `logits` for the token ids in FOLDER.ids.
"""

import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load_model

for folder in map(Path, sys.argv[1:]):
    model, _ = load_model(folder)
    ids = mx.load(f"{folder}.ids", format="safetensors")["ids"]
    result = {"logits": model(ids).astype(mx.float32)}
    for name, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear):
            parts = (module.weight, module.scales.astype(mx.float32), module.biases.astype(mx.float32))
            result[name] = mx.dequantize(*parts, group_size=module.group_size, bits=module.bits)
    mx.save_safetensors(f"{folder}.safetensors", result)
    print(folder, len(result) - 1, flush=True)
