"""GPTQ checkpoints in the layout of auto-gptq, which GPTQModel, optimum, transformers and vLLM read."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from mkaq import __version__
from mkaq.arch.arch import Arch
from mkaq.errors import CheckpointError
from mkaq.formats import dense
from mkaq.formats.format import NO_GGUF, ONLY_DENSE, Config, TensorSchema, type_name, unsupported
from mkaq.formats.packing import unpack_linear

_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_MUST_BE_OFF = {  # what each option means if it is on
    "dynamic": "settings of their own for some modules",
    "rotation": "rotated weights",
    "adapter": "an adapter beside the weights",
    "is_marlin_format": "weights laid out for the Marlin kernel",
}
_CHECKPOINT_FORMATS = ("gptq", "gptq_v2")
NEEDS = "pip install optimum gptqmodel"


def quantization_config(
    *,
    bits: int,
    group_size: int,
    sym: bool,
    scattered: bool,
    static_groups: bool,
    damp_percent: float,
    lm_head: bool = False,
) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint, as GPTQModel, transformers and vLLM read it.

    In it `desc_act` means that the columns of a group lie apart. With static groups they do not, whatever the
    order in which columns were solved. GPTQModel opens asymmetric version-1 files only with a marker (its
    own, from 0.9 on) that their zero points do not overflow. mkaq's never do (`packing.pack_linear`), so the
    marker is set.

    Args:
        bits: Bits per code.
        group_size: Weights of a row that share a scale; -1 for all.
        sym: Whether the zero point is the middle of the range.
        scattered: Whether the columns of a group lie apart.
        static_groups: Whether scales were fixed before solving.
        damp_percent: Damping of the Hessian.
        lm_head: Whether the output layer is quantized too.
    """
    marker = [] if sym else ["gptqmodel:0.9.0"]
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "format": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": sym,
        "desc_act": scattered,
        "static_groups": static_groups,
        "true_sequential": True,
        "damp_percent": damp_percent,
        "lm_head": lm_head,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"mkaq:{__version__}", *marker]},
    }


def checkpoint_format(config: Mapping[str, Any]) -> str:
    """`gptq`, which stores zero points minus one, or `gptq_v2`, which stores them unchanged."""
    return str(config.get("checkpoint_format") or config.get("format") or "gptq")


def check_config(config: Config, arch: Arch, where: object) -> None:
    """Refuses variants whose tensors have the same names and shapes but would be read wrongly."""
    named = [config[key] for key in ("checkpoint_format", "format") if config.get(key)]
    if len({str(name) for name in named}) > 1:
        raise CheckpointError(
            f"quantization_config says checkpoint_format {named[0]!r} and format {named[1]!r}", where=where
        )
    if checkpoint_format(config) not in _CHECKPOINT_FORMATS:
        raise unsupported(f"checkpoint_format {checkpoint_format(config)!r}", where)
    if config.get("method") not in (None, "gptq"):
        raise unsupported(f"method {config['method']!r}", where)
    if type_name(config.get("pack_dtype")) not in ("None", "int32"):
        raise unsupported(f"pack_dtype {config['pack_dtype']!r}", where)
    for key, meaning in _MUST_BE_OFF.items():
        if config.get(key):
            raise unsupported(f"{key} ({meaning})", where)
    listed = config.get("modules_in_block_to_quantize")
    if listed and not set(arch.linear_names) <= set(re.findall(r"\w+\.\w+", str(listed))):
        raise unsupported("modules_in_block_to_quantize (some layers left dense)", where)
    size, group_size = config.get("bits"), config.get("group_size")
    if size not in (2, 3, 4, 8) or not isinstance(group_size, int) or (group_size < 1 and group_size != -1):
        raise CheckpointError(
            f"quantization_config has bits {size!r} and group_size {group_size!r}", where=where
        )


def quantizes_head(config: Config, head: str) -> bool:
    """As `lm_head` says; readers know it by that name alone."""
    return bool(config.get("lm_head"))


def bits(config: Config) -> int | None:
    """Bits per code."""
    return int(config["bits"])


def schema(shape: tuple[int, int], config: Config) -> dict[str, TensorSchema]:
    """Codes and zero points in 32-bit words, scales, and the group of every column."""
    out_features, in_features = shape
    groups, size = _groups(in_features, config), config["bits"]
    return {
        "qweight": TensorSchema((in_features * size // 32, out_features), ("I32",)),
        "qzeros": TensorSchema((groups, out_features * size // 32), ("I32",)),
        "scales": TensorSchema((groups, out_features)),
        "g_idx": TensorSchema((in_features,), ("I32",)),
    }


def stored_bytes(shape: tuple[int, int], config: Config) -> int:
    """Bytes of these tensors, with scales in float16."""
    (rows, columns), groups = shape, _groups(shape[1], config)
    return int((rows * columns + groups * rows) * config["bits"] // 8 + 2 * groups * rows + 4 * columns)


def read(tensors: dict[str, torch.Tensor], config: Config) -> dict[str, torch.Tensor]:
    """The dense weight instead of the codes."""
    rest = {name: tensor for name, tensor in tensors.items() if name not in _PARTS}
    return rest | {"weight": dequantize(tensors, config)}


restore = dense.restore  # runtimes multiply by the decoded weight too


def dequantize(tensors: dict[str, torch.Tensor], config: Config) -> torch.Tensor:
    """scale * (code - zero), float32."""
    parts = {part: tensors[part] for part in _PARTS}
    return unpack_linear(parts, config["bits"], checkpoint_format(config))


def _groups(in_features: int, config: Config) -> int:
    return 1 if config["group_size"] == -1 else -(-in_features // int(config["group_size"]))


def _transformers(config: Config) -> str:
    if config.get("lm_head"):
        return "it leaves out a quantized output layer, and writes nonsense; export.formats can add " + (
            "compressed-tensors"
        )
    if config["bits"] == 4 and config["group_size"] in (-1, 16):
        return f"its 4-bit kernel takes groups of 32 or more, not {_size(config)}"
    return ""


def _vllm(config: Config, kernels: Sequence[int] = (4, 8)) -> str:
    if config["bits"] not in kernels:
        return f"{config['bits']} bits are not among its GPTQ kernels ({', '.join(map(str, kernels))})"
    if not config["sym"]:
        return "its GPTQ kernels are symmetric, sym: false is not"
    if config["group_size"] not in (-1, 32, 64, 128):
        return f"group_size {config['group_size']} is not among its GPTQ kernels (-1, 32, 64, 128)"
    return "its GPTQ kernels take desc_act with static_groups only" if config["desc_act"] else ""


def _onnx(config: Config) -> str:
    if config["bits"] == 3:
        return "it cannot unpack 3 bits"
    size = config["group_size"]
    if size < 16 or size & (size - 1):  # its operator MatMulNBits says so; few models have only such rows
        return f"its groups are powers of two from 16 on, not {_size(config)}"
    if config["bits"] == 2 and size > 256:
        return f"it takes 2 bits in groups of 256 or fewer, not {_size(config)}"
    if config["desc_act"] and (config["bits"] == 8 or not config["sym"]):
        return "with desc_act and no static_groups it reads 4 bits with sym: true only"
    return ""


def _size(config: Config) -> str:
    return "a whole row" if config["group_size"] == -1 else str(config["group_size"])


REFUSALS: Mapping[str, Callable[[Config], str]] = {
    "transformers on a CPU": _transformers,
    "vLLM": _vllm,
    "vLLM on a CPU": partial(_vllm, kernels=(4,)),
    "ONNX Runtime GenAI": _onnx,
    "MLX": lambda config: "it refuses a checkpoint with g_idx, which GPTQ has; export.formats can add mlx",
    "OpenVINO": lambda config: ONLY_DENSE,
    "llama.cpp": lambda config: NO_GGUF,
}
