"""bitsandbytes over a whole checkpoint, one layer in memory at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mkaq.checkpoint.reader import Checkpoint
from mkaq.checkpoint.writer import ShardWriter, write_side_files
from mkaq.errors import UnsupportedError
from mkaq.files import write_json
from mkaq.formats.bitsandbytes import dequantize, quantization_config
from mkaq.heap import return_freed_memory
from mkaq.progress import Progress
from mkaq.quantize.bnb import quantize_linear
from mkaq.quantize.error import relative_error
from mkaq.recipe import BitsandbytesSection


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
    source: Checkpoint,
    section: BitsandbytesSection,
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    shard_size: int,
    progress: Progress,
) -> list[BnbModule]:
    """Writes the quantized checkpoint and returns the record of every module.

    Args:
        source: The checkpoint to quantize.
        section: The recipe's quantize section.
        folder: Where the checkpoint goes.
        device: Where the library quantizes.
        dtype: Of the tensors that stay dense.
        shard_size: Bytes per file.
        progress: Told of every layer.

    Raises:
        UnsupportedError: If a weight is too large for int8 as the library makes it.
    """
    modules: list[BnbModule] = []
    compute_dtype = section.compute_dtype
    if compute_dtype in (None, "auto"):
        compute_dtype = str(dtype).removeprefix("torch.")  # type: ignore[assignment]
    config = quantization_config(
        bits=section.bits,
        quant_type=section.quant_type,
        double_quant=section.double_quant,
        compute_dtype=str(compute_dtype),
    )
    with ShardWriter(folder, shard_size) as writer:
        for name, tensor in source.each(source.outer_tensor_names):
            writer.add(name, tensor.to(dtype))
        for index in progress.track(range(source.num_layers), "quantize (bitsandbytes)"):
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
    write_side_files(source, folder)
    return modules


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
