"""Random GPTQ checkpoints for the tests of exports: a tiny model of a family, rounded to the nearest code."""

from pathlib import Path
from typing import Any

import torch

from mkaq.checkpoint.reader import Checkpoint
from mkaq.checkpoint.side_files import copy_side_files
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.checkpoint.writer import ShardWriter
from mkaq.files import write_json
from mkaq.formats.gptq import quantization_config
from mkaq.formats.packing import pack_linear
from mkaq.quantize.gptq import find_scales
from tests.tiny import make_model


def make_gptq(
    folder: Path,
    family: str = "llama",
    *,
    bits: int = 4,
    group_size: int = 32,
    sym: bool = True,
    **changes: Any,
) -> Checkpoint:
    """Writes a GPTQ checkpoint of two layers below a folder, and opens it."""
    source = open_checkpoint(make_model(folder / "dense", family, layers=2, **changes))
    path = folder / "gptq"
    path.mkdir()
    config = quantization_config(
        bits=bits, group_size=group_size, sym=sym, scattered=False, static_groups=False, damp_percent=0.01
    )
    copy_side_files(source.path, path)
    write_json(path / "config.json", {**source.config, "quantization_config": config})
    linears = {f"{source.arch.in_layer(i, n)}.weight" for i in (0, 1) for n in source.arch.linear_names}
    with ShardWriter(path, 1 << 30) as writer:
        for name, tensor in source.each(sorted(source.tensors)):
            if name not in linears:
                writer.add(name, tensor)
                continue
            module = name.removesuffix(".weight")
            for part, stored in rounded(tensor.float(), bits, group_size, sym).items():
                writer.add(f"{module}.{part}", stored)
    return open_checkpoint(path, quantized=True)


def rounded(weight: torch.Tensor, bits: int, group_size: int, sym: bool) -> dict[str, torch.Tensor]:
    """The GPTQ tensors of a weight whose codes are simply the nearest ones."""
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    groups = weight.reshape(rows, columns // size, size)
    scales, zeros = find_scales(groups, torch.ones(columns // size, size), bits, sym)
    codes = (groups / scales[..., None]).round() + zeros[..., None]
    codes = codes.clamp(0, 2**bits - 1).reshape(rows, columns).int()
    return pack_linear(codes, scales, zeros, torch.arange(columns) // size, bits)
