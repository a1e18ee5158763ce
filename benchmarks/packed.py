"""Checkpoints of llm-compressor (compressed-tensors, `pack-quantized`) made dense, to be measured.

Its integers of b bits are stored with 2**(b - 1) added, as little-endian bit streams along the input
features; its scales lie beside them, one for each group of neighbouring inputs of an output.
"""

import json
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open

from mkaq.checkpoint.writer import ShardWriter
from mkaq.files import write_json
from mkaq.formats.packing import unpack


def unpack_weight(packed: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The weight that a packed layer stands for, symmetric.

    Args:
        packed: int32, shape (out_features, in_features * bits / 32), in_features a multiple of 32.
        scale: Shape (out_features, groups).
        bits: Bits per integer.

    Returns:
        float32, shape (out_features, in_features); products are not rounded to the scale's type.
    """
    integers = unpack(packed.T.contiguous(), bits).T - 2 ** (bits - 1)
    return integers.float() * scale.float().repeat_interleave(integers.shape[1] // scale.shape[1], dim=1)


def write_dense(folder: Path, out: Path) -> None:
    """Writes a `pack-quantized` checkpoint of symmetric integers again, every weight dense.

    Args:
        folder: What llm-compressor wrote.
        out: A new folder.
    """
    out.mkdir()
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config")
    (group,) = quantization["config_groups"].values()
    assert quantization["format"] == "pack-quantized" and group["weights"]["symmetric"]
    with ExitStack() as stack, ShardWriter(out, 4 * 10**9) as writer:
        files = [stack.enter_context(safe_open(file, "pt")) for file in sorted(folder.glob("*.safetensors"))]
        where = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        for name, file in where.items():
            module, _, part = name.rpartition(".")
            if part == "weight_packed":
                scale = where[f"{module}.weight_scale"].get_tensor(f"{module}.weight_scale")
                weight = unpack_weight(file.get_tensor(name), scale, group["weights"]["num_bits"])
                writer.add(f"{module}.weight", weight)
            elif part not in ("weight_scale", "weight_shape"):
                writer.add(name, file.get_tensor(name))
    write_json(out / "config.json", config)
