"""Tiny models made on the fly, one per family: two query heads per key head, grouped to fit 32.

And the text and the recipes that go with them.
"""

import json
import shutil
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from mkaq.checkpoint.resolve import BUILTIN
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.formats.gptq import quantization_config
from mkaq.formats.packing import pack_linear

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3")
SIMILAR = {"order": "similarity", "fuse": "average", "coefficient": "similarity", "manifold": {"points": 128}}
PROTECT = {"protect": {"first": 1, "last": 0}, **SIMILAR}
CHANNELS = {"layers": 1, "fuse": "channels", "order": "measured", "protect": {"first": 1, "last": 0}}
_SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_EXTRA: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 24},
    "qwen2": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 3},
    "qwen3": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "sliding_window": 24, "query_pre_attn_scalar": 32},
    "phi3": {"original_max_position_embeddings": 256},
}


def make_model(folder: Path, family: str = "llama", layers: int = 4, **changes: Any) -> Path:
    """Writes a random model of a family, with the built-in tokenizer, and returns its folder."""
    torch.manual_seed(0)
    save = {"max_shard_size": changes.pop("shard_size", "5GB")}
    config = AutoConfig.for_model(
        family, num_hidden_layers=layers, **_SHAPE | _EXTRA.get(family, {}) | changes
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, tensor in model.named_parameters():  # norms and biases that differ, so that merging shows
            if tensor.dim() == 1:
                tensor.add_(torch.randn_like(tensor) * 0.2)
            elif "embed" not in name:
                tensor.mul_(3)
    model.save_pretrained(folder, **save)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BUILTIN["builtin:tiny-llama"] / name, folder / name)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes keys of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def write_text(path: Path) -> Path:
    """Some English: 70 of Python's help topics."""
    path.write_text("\n\n".join(topics.topics[name] for name in sorted(topics.topics)[:70]), encoding="utf-8")
    return path


def write_recipe(path: Path, model: Path, text: Path, /, **sections: Any) -> Path:
    """A small recipe on a text file; keyword arguments replace whole sections."""
    plain = {"dataset": "text", "path": str(text), "max_seq_length": 32}
    data: dict[str, Any] = {
        "version": 1,
        "name": "test",
        "model": {"path": str(model)},
        "calibration": {**plain, "num_samples": 8},
        "merge": {"layers": 1, **PROTECT},
        "recover": None,
        "quantize": {"method": "gptq", "bits": 4, "group_size": 32},
        "evaluate": {"perplexity": {**plain, "num_samples": 2}},
    }
    data |= sections
    if not data["merge"] and (data["quantize"] or {}).get("method") == "bitsandbytes":
        del data["calibration"]  # nothing reads it
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def make_gptq(folder: Path, dense: Path, bits: int = 4, group_size: int = 32, *, sym: bool = True) -> Path:
    """Writes a dense model as a GPTQ checkpoint, with weights rounded to the nearest."""
    shutil.copytree(dense, folder)
    model = open_checkpoint(dense)
    tensors = model.read(model.tensors)
    for name in [n for n in tensors if n.removesuffix(".weight").endswith(model.arch.linear_names)]:
        weight = tensors.pop(name).float()
        rows, columns = weight.shape
        size = columns if group_size == -1 else group_size
        groups = weight.reshape(rows, -1, size)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        if sym:
            high = torch.maximum(high, -low)
            low = -high
        scales = ((high - low) / (2**bits - 1)).clamp(min=1e-4).to(torch.float16)
        zeros = (2 ** (bits - 1) if sym else (-low / scales.float()).round().clamp(1, 2**bits)) + 0 * scales
        codes = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 2**bits - 1)
        g_idx = torch.arange(columns) // size
        packed = pack_linear(codes.int().reshape(rows, columns), scales, zeros.int(), g_idx, bits)
        tensors |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in packed.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    options = {"scattered": False, "static_groups": False, "damp_percent": 0.01}
    settings = quantization_config(bits=bits, group_size=group_size, sym=sym, **options)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder
