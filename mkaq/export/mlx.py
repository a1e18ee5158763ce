"""MLX's affine form: the codes of GPTQ with w = scale * code + bias, where bias = -zero * scale.

mlx-lm takes a module as quantized if the file holds its `scales`, and finds bits and group size from the
shapes (mlx-lm 0.32, `load_model`), so embeddings and head stay as they are. MLX multiplies in the type to
which input, scales and biases are promoted: with bfloat16 weights and float16 scales that is float32.
"""

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
from mkaq.formats.packing import unpack

NAME = "mlx"
_SIZES = (32, 64, 128)


def refusal(model: Checkpoint, quantization: Mapping[str, Any] | None) -> str:
    """Why the format cannot hold a model; empty if it can."""
    if quantization is None:
        return "nothing was quantized, and mlx-lm reads the safetensors as they are"
    reason = codes_refusal(quantization)
    if not reason and quantization["group_size"] not in _SIZES:
        return f"its groups have 32, 64 or 128 weights, not {quantization['group_size']}"
    return reason


def write(model: Checkpoint, folder: Path, settings: Settings) -> None:
    """Writes a folder that mlx-lm loads; arguments and errors as in `mkaq.export.formats`."""
    refuse(refusal(model, model.quantization), NAME, model)
    write_folder(model, folder, _repacking(model), settings.shard_size)


def check(model: Checkpoint, folder: Path, settings: Settings) -> Iterator[str]:
    """Yields a sentence for each difference between a folder and the checkpoint that it was made from."""
    yield from folder_faults(model, folder, _repacking(model))


def mlx_config(model: Checkpoint) -> dict[str, Any]:
    """config.json for mlx-lm.

    Most of its models know rotary embeddings only by `rope_theta` and `rope_scaling`: without the first they
    silently take 10,000. transformers 5 writes both into `rope_parameters`.
    """
    own, rope = model.quantization or {}, dict(model.hf_config.rope_parameters)
    plain = {key: value for key, value in model.config.items() if key != "quantization_config"}
    theta = rope.pop("rope_theta")
    scaling = None if rope.get("rope_type", "default") == "default" else {**rope, "type": rope["rope_type"]}
    quantization = {"group_size": own["group_size"], "bits": own["bits"], "mode": "affine"}
    return {**plain, "rope_theta": theta, "rope_scaling": scaling, "quantization": quantization}


def biases(codes: Codes, dtype: torch.dtype) -> torch.Tensor:
    """-zero * scale, exactly.

    Args:
        codes: A linear layer.
        dtype: The type of the result.

    Returns:
        Shape (out_features, groups).

    Raises:
        ValueError: If some are no numbers of that type; the message has their count.
    """
    exact = -codes.zeros * codes.scales.float()  # at most 9 bits times 11: exact in float32
    result = exact.to(dtype)
    if lost := int((result.float() != exact).sum()):
        raise ValueError(f"{lost} of {exact.numel()} products of zero point and scale are no {dtype}")
    return result


def _repacking(model: Checkpoint) -> Repacking:
    own = model.quantization or {}
    bits, size = own["bits"], own["group_size"]
    scale = DTYPES[model.tensors[f"{next(iter(model.quantized_linears))}.scales"].dtype]
    bias = scale if own.get("sym") else torch.float32  # 3 * scale is seldom a float16, 8 * scale always is

    def specs(shape: tuple[int, int]) -> dict[str, TensorSpec]:
        rows, columns = shape
        return {
            "weight": TensorSpec(torch.uint32, (rows, columns * bits // 32)),
            "scales": TensorSpec(scale, (rows, columns // size)),
            "biases": TensorSpec(bias, (rows, columns // size)),
        }

    def repack(codes: Codes, name: str) -> Tensors:
        try:
            added = biases(codes, bias)
        except ValueError as error:
            raise UnsupportedError(f"{NAME} cannot hold {name}: {error}", where=model.path) from None
        return {"weight": codes.words.view(torch.uint32), "scales": codes.scales, "biases": added}

    def decode(tensors: Tensors) -> torch.Tensor:
        codes = unpack(tensors["weight"].view(torch.int32).T.contiguous(), bits).T
        group = torch.arange(codes.shape[1]) // size
        return tensors["scales"].float()[:, group] * codes + tensors["biases"].float()[:, group]

    return Repacking(mlx_config(model), specs, repack, decode)
