"""Quantizes every linear layer of a checkpoint by itself, without calibration."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mkaq.checkpoint.output import Output, cast, with_dtype
from mkaq.checkpoint.reader import Checkpoint
from mkaq.checkpoint.side_files import copy_side_files
from mkaq.checkpoint.writer import ShardWriter
from mkaq.errors import UnsupportedError
from mkaq.files import write_json
from mkaq.formats.formats import format_of
from mkaq.heap import return_freed_memory
from mkaq.quantize.shortfall import vanishing_rows
from mkaq.quantize.weight_error import relative_error

_OTHERS = {True: "quantize.bits: 4", False: "quantize.double_quant: false"}
"""What holds weights that 8 bits, or 4 bits, do not."""


@dataclass(frozen=True)
class RoundedModule:
    """The record of a quantized linear layer.

    Attributes:
        name: The module's name in the model.
        weight_error: ||W - Q||^2 / ||W||^2.
        clamped_scales: Rows of int8 whose weights are too small for float16; None with 4 bits.
        fallback: Always false.
    """

    name: str
    weight_error: float
    clamped_scales: int | None = None
    fallback: bool = False


def quantize_each(
    source: Checkpoint,
    config: Mapping[str, Any],
    quantize: Callable[[torch.Tensor, Mapping[str, Any], torch.device], dict[str, torch.Tensor]],
    folder: Path,
    device: torch.device,
    output: Output,
) -> tuple[list[RoundedModule], Mapping[str, str]]:
    """Writes the quantized checkpoint; returns the record of every module, and sha256 of files by name.

    Args:
        source: The checkpoint to quantize.
        config: The quantization_config of the quantized checkpoint.
        quantize: Returns the tensors that store a weight, by their names in the module; raises an
            OverflowError for weights that the format cannot hold.
        folder: Where the checkpoint goes.
        device: Where layers are quantized.
        output: How it is written.

    Raises:
        UnsupportedError: If the format, or the dtype of other weights, cannot hold a weight.
    """
    modules: list[RoundedModule] = []
    dtype = output.dtype
    with ShardWriter(folder, output.shard_size) as writer:
        for name, tensor in source.each(source.outer_tensor_names):
            writer.add(name, cast(tensor, dtype, name))
        for index in output.progress.track(range(source.num_layers), f"quantize ({config['quant_method']})"):
            arch = source.arch
            linears = {arch.in_layer(index, f"{name}.weight") for name in arch.linear_names}
            for name, tensor in source.each(source.layer_tensor_names(index)):
                if name not in linears:
                    writer.add(name, cast(tensor, dtype, name))
                    continue
                module = name.removesuffix(".weight")
                try:
                    stored = quantize(tensor, config, device)
                except OverflowError as error:
                    raise UnsupportedError(
                        f"tensor {name} has {error}",
                        where=source.path / source.tensors[name].file,
                        fix=f"use {_OTHERS[bool(config.get('load_in_8bit'))]}, or quantize.method: gptq",
                    ) from None
                rounded = format_of(config).dequantize(stored, config)
                small = vanishing_rows(tensor) if config.get("load_in_8bit") else None
                modules.append(RoundedModule(module, relative_error(tensor, rounded), small))
                for part, value in stored.items():
                    writer.add(f"{module}.{part}", value)
            return_freed_memory()
    write_json(folder / "config.json", {**with_dtype(source.config, dtype), "quantization_config": config})
    copy_side_files(source.path, folder)
    return modules, writer.digests
