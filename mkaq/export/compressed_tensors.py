"""compressed-tensors (pack-quantized): the codes and scales of GPTQ as llm-compressor stores them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mkaq.checkpoint.layout import TensorSpec
from mkaq.checkpoint.reader import Checkpoint
from mkaq.dtypes import DTYPES
from mkaq.errors import UnsupportedError
from mkaq.export.codes import Codes, codes_refusal, quantized_linears
from mkaq.export.folder import Repacking, Tensors, folder_faults, refuse, write_folder
from mkaq.formats.compressed_tensors import dequantize, pack_linear, quantization_config, schema

NAME = "compressed-tensors"


def refusal(model_type: str, quantization: Mapping[str, Any] | None) -> str:
    """Why the format cannot hold a model; empty if it can.

    Args:
        model_type: The model's family; the format holds each.
        quantization: The quantization_config; None for a dense model.
    """
    return codes_refusal(quantization)


def write(model: Checkpoint, folder: Path, shard_size: int) -> None:
    """Writes a Hugging Face folder.

    Args:
        model: A GPTQ checkpoint.
        folder: An empty folder.
        shard_size: Data bytes per weight file.

    Raises:
        CheckpointError: If a tensor cannot be read.
        UnsupportedError: If the format cannot hold the model exactly.
    """
    refuse(refusal(model.config["model_type"], model.quantization), NAME, model)
    write_folder(model, folder, _repacking(model), shard_size)


def check(model: Checkpoint, folder: Path) -> Iterator[str]:
    """Compares a folder with the GPTQ checkpoint that it was made from.

    Yields:
        A sentence for each fault.
    """
    if reason := refusal(model.config["model_type"], model.quantization):
        yield f"{NAME} cannot hold this model: {reason}"
    else:
        yield from folder_faults(model, folder, _repacking(model))


def _repacking(model: Checkpoint) -> Repacking:
    own = model.quantization or {}
    config = quantization_config(
        bits=own["bits"], group_size=own["group_size"], sym=bool(own.get("sym")), head=model.arch.head
    )
    linears = quantized_linears(model)
    scale = DTYPES[model.tensors[f"{next(iter(linears))}.scales"].dtype]
    types = {"weight_packed": torch.int32, "weight_scale": scale, "weight_shape": torch.int64}

    def specs(shape: tuple[int, int]) -> dict[str, TensorSpec]:
        parts = schema(shape, config).items()
        return {name: TensorSpec(types.get(name, torch.int32), part.shape or ()) for name, part in parts}

    def repack(codes: Codes, name: str) -> Tensors:
        try:
            return pack_linear(codes.words, codes.scales, codes.zeros, linears[name][1], config)
        except ValueError as error:
            raise UnsupportedError(f"{name}: {error}", where=model.path) from None

    return Repacking(
        {**model.config, "quantization_config": config},
        specs,
        repack,
        lambda tensors: dequantize(tensors, config),
    )
