"""compressed-tensors checkpoints, format pack-quantized: what llm-compressor writes and vLLM reads.

`weight_packed` holds the codes of a row as one bit stream, lowest bits first: GPTQ's `qweight`, transposed.
`weight_zero_point` holds zero points in the same way, along the rows. The library takes codes and zero points
as signed numbers, less 2**(bits - 1), and adds that again when it packs. From 0.19 on the library packs 3
bits without gaps; 0.17 puts ten codes into a word, which shows in the shape: it refuses the newer form.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mkaq.arch.arch import Arch
from mkaq.errors import CheckpointError
from mkaq.formats import dense
from mkaq.formats.format import NO_GGUF, Config, TensorSchema, unsupported
from mkaq.formats.packing import pack, unpack

_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
_FORMAT = "pack-quantized"
_MUST_BE_OFF = ("kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config")
NEEDS = "pip install compressed-tensors"


def quantization_config(*, bits: int, group_size: int, sym: bool, ignore: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint, as transformers and vLLM read it.

    With zero points, transformers 5.23 with compressed-tensors 0.19 or 0.20 loads a checkpoint only if it may
    decode it at once (without, it expects zero points that are not packed), so `dequantize` is set.

    Args:
        bits: Bits per code.
        group_size: Neighbouring weights of a row that share a scale; -1 for all.
        sym: Whether the zero point is the middle of the range.
        ignore: Linear layers that stay dense: the output layer, or none.
    """
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": sym,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": _FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "format": _FORMAT}},
        "ignore": [*ignore],
        "kv_cache_scheme": None,
        **({} if sym else {"dequantize": True}),
    }


def check_config(config: Config, arch: Arch, where: object) -> None:
    """Accepts one group of packed integers for all linear layers of the decoder layers, and no more."""
    groups = config.get("config_groups")
    group = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
    weights = group.get("weights") if isinstance(group, dict) else None
    if group is None or not isinstance(weights, dict):
        raise unsupported("not exactly one config group with settings for weights", where)
    for name in (config.get("format"), group.get("format") or _FORMAT):
        if name != _FORMAT:
            raise unsupported(f"format {str(name)[:40]!r}", where)
    if config.get("quantization_status") != "compressed":
        raise unsupported(f"quantization_status {str(config.get('quantization_status'))[:40]!r}", where)
    for key in _MUST_BE_OFF:
        if config.get(key):
            raise unsupported(key, where)
    if group.get("targets") != ["Linear"] or config.get("ignore") not in ([arch.head], []):
        raise unsupported(f"targets other than Linear, or an ignore list other than {arch.head}", where)
    if group.get("input_activations") or group.get("output_activations"):
        raise unsupported("quantized activations", where)
    _check_weights(weights, where)


def _check_weights(weights: Mapping[str, Any], where: object) -> None:
    if weights.get("type", "int") != "int" or weights.get("dynamic") or weights.get("block_structure"):
        raise unsupported("weights that are not integers in static groups", where)
    if weights.get("actorder") in (True, "group"):
        raise unsupported("actorder group (the columns of a group lie apart)", where)
    bits, strategy, size = (weights.get(key) for key in ("num_bits", "strategy", "group_size"))
    one_row = strategy == "channel" and size in (None, -1)
    grouped = strategy == "group" and isinstance(size, int) and size >= 1
    if bits not in (2, 3, 4, 8) or not (one_row or grouped):
        raise CheckpointError(
            f"quantization_config has num_bits {bits!r}, strategy {strategy!r}, group_size {size!r}",
            where=where,
        )


def _weights(config: Config) -> Mapping[str, Any]:
    weights: Mapping[str, Any] = next(iter(config["config_groups"].values()))["weights"]
    return weights


def quantizes_head(config: Config, head: str) -> bool:
    """Unless it is ignored."""
    return head not in config["ignore"]


def bits(config: Config) -> int | None:
    """Bits per code."""
    return int(_weights(config)["num_bits"])


def schema(shape: tuple[int, int], config: Config) -> dict[str, TensorSchema]:
    """Codes in 32-bit words, scales, the weight's shape; zero points in words if they are not the middle."""
    (rows, columns), weights = shape, _weights(config)
    groups = -(-columns // (weights["group_size"] or columns)) if weights["strategy"] == "group" else 1
    size = weights["num_bits"]
    result = {
        "weight_packed": TensorSchema((rows, -(-columns * size // 32)), ("I32",)),
        "weight_scale": TensorSchema((rows, groups)),
        "weight_shape": TensorSchema((2,), ("I64", "I32")),
    }
    if not weights.get("symmetric", True):
        result["weight_zero_point"] = TensorSchema((-(-rows * size // 32), groups), ("I32",))
    return result


def stored_bytes(shape: tuple[int, int], config: Config) -> int:
    """Bytes of these tensors, with scales in float16."""
    width = {"weight_packed": 4, "weight_scale": 2, "weight_shape": 8, "weight_zero_point": 4}
    stored = schema(shape, config).items()
    return sum(width[name] * torch.Size(tensor.shape or ()).numel() for name, tensor in stored)


def pack_linear(
    words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, columns: int, config: Config
) -> dict[str, torch.Tensor]:
    """The tensors of a linear layer.

    Args:
        words: Its codes as `weight_packed` has them, int32, shape (out_features, in_features * bits / 32).
        scales: Shape (out_features, groups).
        zeros: Zero points in [0, 2**bits), int32, shape (out_features, groups).
        columns: in_features.
        config: The quantization_config.

    Raises:
        ValueError: If a zero point does not fit into its bits.
    """
    size = _weights(config)["num_bits"]
    if int(zeros.min()) < 0 or int(zeros.max()) >= 2**size:
        raise ValueError(f"a zero point does not fit into {size} bits")
    result = {"weight_packed": words, "weight_scale": scales}
    result["weight_shape"] = torch.tensor([len(words), columns])
    if not _weights(config)["symmetric"]:
        result["weight_zero_point"] = pack(zeros, size)
    return result


def read(tensors: dict[str, torch.Tensor], config: Config) -> dict[str, torch.Tensor]:
    """The dense weight instead of the codes."""
    rest = {name: tensor for name, tensor in tensors.items() if name not in _PARTS}
    return rest | {"weight": dequantize(tensors, config)}


restore = dense.restore  # runtimes multiply by the decoded weight too


def dequantize(tensors: dict[str, torch.Tensor], config: Config) -> torch.Tensor:
    """scale * (code - zero), float32.

    Raises:
        ValueError: If the tensors do not match one another, or have sizes that are no multiples of 32.
    """
    weights, scales = _weights(config), tensors["weight_scale"].float()
    size, (rows, groups) = weights["num_bits"], scales.shape
    columns = tensors["weight_packed"].shape[1] * 32 // size
    if tensors["weight_shape"].tolist() != [rows, columns] or columns % 32:
        raise ValueError(
            f"weight_shape is {tensors['weight_shape'].tolist()}, the codes fill {columns} columns"
        )
    codes = unpack(tensors["weight_packed"].T.contiguous(), size).T
    zeros = torch.full((rows, groups), 2 ** (size - 1), dtype=torch.int32)
    if "weight_zero_point" in tensors:
        if rows % 32:
            raise ValueError(f"zero points of {rows} rows, which is no multiple of 32")
        zeros = unpack(tensors["weight_zero_point"], size)
    group = torch.arange(columns) // (weights["group_size"] if weights["strategy"] == "group" else columns)
    return (codes - zeros[:, group]).float() * scales[:, group]


def _vllm_cpu(config: Config) -> str:
    size = _weights(config)["group_size"]
    if not config["ignore"]:
        return "it knows no quantized output layer in this format"
    if (number := bits(config)) != 4:
        return f"it has no kernel for {number} bits"
    return "" if size in (None, 32, 64, 128) else f"whether it runs group_size {size} is not known"


_ELSEWHERE = "its reader of compressed-tensors is for other models"
REFUSALS: Mapping[str, Callable[[Config], str]] = {
    "transformers on a CPU": lambda config: "",
    "vLLM on a CPU": _vllm_cpu,
    "ONNX Runtime GenAI": lambda config: _ELSEWHERE,
    "MLX": lambda config: _ELSEWHERE,
    "llama.cpp": lambda config: NO_GGUF,
}
