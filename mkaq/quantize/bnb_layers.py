"""bitsandbytes over a whole checkpoint, one layer in memory at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mkaq.checkpoint.output import Output
from mkaq.checkpoint.reader import Checkpoint
from mkaq.checkpoint.side_files import copy_side_files
from mkaq.checkpoint.writer import ShardWriter
from mkaq.errors import UnsupportedError
from mkaq.files import write_json
from mkaq.formats.bitsandbytes import dequantize
from mkaq.heap import return_freed_memory
from mkaq.quantize.bnb import quantize_linear
from mkaq.quantize.error import relative_error


@dataclass(frozen=True)
class BnbModule:
    """What is recorded of one quantized layer.

    Attributes:
        name: The module's name in the model.
        weight_error: ||W - Q||^2 / ||W||^2.
        fallback: Always false.
    """

    name: str
    weight_error: float
    fallback: bool = False


def quantize_bitsandbytes(
    source: Checkpoint, config: Mapping[str, Any], folder: Path, device: torch.device, output: Output
) -> tuple[list[BnbModule], Mapping[str, str]]:
    """Writes the quantized checkpoint; returns the record of every module, and sha256 of files by name.

    Args:
        source: The checkpoint to quantize.
        config: The quantization_config of what comes out.
        folder: Where the checkpoint goes.
        device: Where the library quantizes.
        output: How it is written.

    Raises:
        UnsupportedError: If a weight is too large for int8 as the library makes it.
    """
    modules: list[BnbModule] = []
    dtype = output.dtype
    with ShardWriter(folder, output.shard_size) as writer:
        for name, tensor in source.each(source.outer_tensor_names):
            writer.add(name, tensor.to(dtype))
        for index in output.progress.track(range(source.num_layers), "quantize (bitsandbytes)"):
            arch = source.arch
            linears = {arch.in_layer(index, f"{name}.weight") for name in arch.linear_names}
            for name, tensor in source.each(source.layer_tensor_names(index)):
                if name not in linears:
                    writer.add(name, tensor.to(dtype))
                    continue
                module = name.removesuffix(".weight")
                stored = _quantize(source, name, tensor, config, device)
                modules.append(BnbModule(module, relative_error(tensor, dequantize(stored, config))))
                for part, value in stored.items():
                    writer.add(f"{module}.{part}", value)
            return_freed_memory()
    whole = {**source.config, "dtype": str(dtype).removeprefix("torch."), "quantization_config": config}
    whole.pop("torch_dtype", None)
    write_json(folder / "config.json", whole)
    copy_side_files(source.path, folder)
    return modules, writer.digests


def _quantize(
    source: Checkpoint, name: str, tensor: torch.Tensor, config: Mapping[str, Any], device: torch.device
) -> dict[str, torch.Tensor]:
    """`quantize_linear` for a tensor of a checkpoint, which an error names."""
    try:
        return quantize_linear(tensor, config, device)
    except OverflowError as error:
        raise UnsupportedError(
            f"tensor {name} has {error}",
            where=source.path / source.tensors[name].file,
            fix="use quantize.bits: 4, or quantize.method: gptq",
        ) from None
