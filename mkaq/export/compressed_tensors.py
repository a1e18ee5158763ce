"""compressed-tensors (pack-quantized): the codes and scales of GPTQ as llm-compressor stores them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mkaq.checkpoint.layout import TensorSpec
from mkaq.checkpoint.reader import Checkpoint
from mkaq.dtypes import DTYPES
from mkaq.errors import UnsupportedError
from mkaq.export.codes import Codes, codes_refusal
from mkaq.export.folder import Repacking, Tensors, folder_faults, refuse, write_folder
from mkaq.export.settings import Settings
from mkaq.formats.compressed_tensors import dequantize, pack_linear, quantization_config, schema

NAME = "compressed-tensors"


def refusal(model: Checkpoint, quantization: Mapping[str, Any] | None) -> str:
    """Why the format cannot hold a model; empty if it can."""
    return codes_refusal(quantization)


def write(model: Checkpoint, folder: Path, settings: Settings) -> None:
    """Writes a Hugging Face folder; arguments and errors as in `mkaq.export.formats`."""
    refuse(refusal(model, model.quantization), NAME, model)
    write_folder(model, folder, _repacking(model), settings.shard_size)


def check(model: Checkpoint, folder: Path, settings: Settings) -> Iterator[str]:
    """Yields a sentence for each difference between a folder and the checkpoint that it was made from."""
    yield from folder_faults(model, folder, _repacking(model))


def _repacking(model: Checkpoint) -> Repacking:
    own = model.quantization or {}
    form = {"bits": own["bits"], "group_size": own["group_size"], "sym": bool(own.get("sym"))}
    config = quantization_config(**form, ignore=[] if model.quantizes_head else [model.arch.head])
    linears = model.quantized_linears
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
