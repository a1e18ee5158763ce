"""bitsandbytes int8 and 4-bit checkpoints as transformers stores them, read with the library's modules."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from mkaq.arch.arch import Arch
from mkaq.errors import CheckpointError
from mkaq.formats.format import NO_GGUF, ONLY_DENSE, Config, TensorSchema, type_name, unsupported

_SKIPPED = ("llm_int8_skip_modules", "modules_to_not_convert")
_BLOCK = 64  # weights that share a scale
_NOT_THERE = "it has no bitsandbytes of its own"
NEEDS = "pip install bitsandbytes accelerate"
REFUSALS: Mapping[str, Callable[[Config], str]] = {
    "transformers on a CPU": lambda config: "",
    **{name: lambda config: _NOT_THERE for name in ("vLLM", "vLLM on a CPU", "ONNX Runtime GenAI", "MLX")},
    "OpenVINO": lambda config: ONLY_DENSE,
    "llama.cpp": lambda config: NO_GGUF,
}


def quantization_config(
    *, bits: int, quant_type: str | None, double_quant: bool | None, compute_dtype: str
) -> dict[str, Any]:
    """The `quantization_config` with which transformers loads a checkpoint.

    Args:
        bits: 4 or 8.
        quant_type: For 4 bits: nf4 or fp4.
        double_quant: For 4 bits: whether scales are quantized too.
        compute_dtype: For 4 bits: the dtype in which decoded weights are multiplied.
    """
    four = bits == 4
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "bnb_4bit_quant_type": quant_type or "fp4",
        "bnb_4bit_use_double_quant": bool(double_quant),
        "bnb_4bit_compute_dtype": compute_dtype if four else "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_skip_modules": ["lm_head"],
    }


def check_config(config: Config, arch: Arch, where: object) -> None:
    """Refuses storage types other than uint8, and layers left dense."""
    if bool(config.get("load_in_8bit")) == bool(config.get("load_in_4bit")):
        raise CheckpointError("quantization_config must say either load_in_8bit or load_in_4bit", where=where)
    if type_name(config.get("bnb_4bit_quant_storage")) not in ("None", "uint8"):
        raise unsupported(f"bnb_4bit_quant_storage {config['bnb_4bit_quant_storage']!r}", where)
    if config.get("llm_int8_has_fp16_weight"):
        raise unsupported("llm_int8_has_fp16_weight", where)
    for key in _SKIPPED:
        skipped = config.get(key) or []
        for name in skipped if isinstance(skipped, list) else [skipped]:
            if _may_match_linear(str(name), arch):
                raise unsupported(f"{key} with {str(name)[:60]!r} (some layers left dense)", where)


def quantizes_head(config: Config, head: str) -> bool:
    """Never."""
    return False


def bits(config: Config) -> int | None:
    """Bits per code."""
    return 8 if config.get("load_in_8bit") else 4


def schema(shape: tuple[int, int], config: Config) -> dict[str, TensorSchema]:
    """Codes, one or two per byte, and the library's quantization state."""
    if config.get("load_in_8bit"):
        return {
            "weight": TensorSchema(shape, ("I8",)),
            "SCB": TensorSchema((shape[0],)),
            "weight_format": TensorSchema(None, ("U8",)),
        }
    nested = bool(config.get("bnb_4bit_use_double_quant"))
    result = {
        "weight": TensorSchema(((shape[0] * shape[1] + 1) // 2, 1), ("U8",)),
        "weight.absmax": TensorSchema(None, ("U8",)) if nested else TensorSchema(None),
        "weight.quant_map": TensorSchema((16,)),
        f"weight.quant_state.bitsandbytes__{config.get('bnb_4bit_quant_type', 'fp4')}": TensorSchema(
            None, ("U8",)
        ),
    }
    if nested:
        result |= {
            "weight.nested_absmax": TensorSchema(None),
            "weight.nested_quant_map": TensorSchema((256,)),
        }
    return result


def stored_bytes(shape: tuple[int, int], config: Config) -> int:
    """Bytes of codes and scales, plus an estimate for the rest."""
    rows, columns = shape
    if config.get("load_in_8bit"):
        return rows * columns + 4 * rows + 1
    blocks = -(-rows * columns // _BLOCK)
    nested = bool(config.get("bnb_4bit_use_double_quant"))
    scales = blocks + 4 * -(-blocks // 256) + 1024 if nested else 4 * blocks
    return (rows * columns + 1) // 2 + scales + 64 + 150


def read(tensors: dict[str, torch.Tensor], config: Config) -> dict[str, torch.Tensor]:
    """The tensors, unchanged: the library decodes them when it multiplies."""
    return tensors


def restore(
    tensors: dict[str, torch.Tensor],
    like: nn.Linear,
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    """The library's module for a stored layer."""
    import bitsandbytes as bnb

    shape = {"input_features": like.in_features, "output_features": like.out_features, "bias": False}
    linear: Any
    if config.get("load_in_8bit"):
        _check_rows(tensors)
        linear = bnb.nn.Linear8bitLt(
            **shape, has_fp16_weights=False, threshold=config.get("llm_int8_threshold", 6.0)
        )
        codes = tensors["weight"].to(device)
        linear.weight = bnb.nn.Int8Params(codes, False, False, CB=codes, SCB=tensors["SCB"].to(device))
    else:
        compute_dtype = getattr(torch, str(config.get("bnb_4bit_compute_dtype", "float32")), None)
        if not isinstance(compute_dtype, torch.dtype):
            raise ValueError("bnb_4bit_compute_dtype is no type")
        linear = bnb.nn.Linear4bit(
            **shape, compute_dtype=compute_dtype, quant_type=config["bnb_4bit_quant_type"]
        )
        linear.weight = bnb.nn.Params4bit.from_prequantized(
            data=tensors["weight"],
            quantized_stats=_state_tensors(tensors),
            requires_grad=False,
            device=device,
            module=linear,
        )
        if like.out_features % 32:  # the library's own CPU kernel would fail; its plain one does not
            linear.support_avx512bf16_for_cpu = False
        _check_state(linear.weight.quant_state, like.weight.shape, config["bnb_4bit_quant_type"])
    if "bias" in tensors:
        linear.bias = nn.Parameter(tensors["bias"].to(dtype).to(device), requires_grad=False)
    return linear.eval()  # type: ignore[no-any-return]


def dequantize(tensors: dict[str, torch.Tensor], config: Config) -> torch.Tensor:
    """The weight that a stored layer represents, float32."""
    from bitsandbytes import functional

    if config.get("load_in_8bit"):
        _check_rows(tensors)
        return tensors["weight"].float() * tensors["SCB"].float().unsqueeze(1) / 127.0
    state = functional.QuantState.from_dict(_state_tensors(tensors), torch.device("cpu"))
    dense: torch.Tensor = functional.dequantize_4bit(tensors["weight"], state)
    return dense.float()


def _state_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors stored with 4-bit codes."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith("weight.")}


def _check_rows(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuses int8 codes in another order than row by row, which `weight_format` shows."""
    if "weight_format" in tensors and int(tensors["weight_format"]) != 0:
        raise ValueError(f"weight_format {int(tensors['weight_format'])} is not row by row")


def _check_state(state: Any, shape: torch.Size, quant_type: str) -> None:
    """Compares the stored state with config.json, and checks the number of scales.

    With too few scales the library would read past their end.
    """
    weights = shape.numel()
    if tuple(state.shape) != tuple(shape) or state.quant_type != quant_type:
        stored = f"{state.quant_type} of shape {list(state.shape)}"
        raise ValueError(f"codes say {stored}, config.json {quant_type} of shape {list(shape)}")
    if state.absmax.numel() != -(-weights // state.blocksize):
        raise ValueError(f"{state.absmax.numel()} scales for {weights} weights")
    if state.nested and state.state2.absmax.numel() != -(-state.absmax.numel() // state.state2.blocksize):
        raise ValueError(f"{state.state2.absmax.numel()} scales for {state.absmax.numel()} scales")


def _may_match_linear(name: str, arch: Arch) -> bool:
    """Whether an entry in a list of modules can match a linear layer of a decoder layer.

    Libraries read entries as prefixes, suffixes or regular expressions of full names.
    """
    if not re.fullmatch(r"[\w.]+", name):
        return True
    for layers in (arch.layer_name(0).removesuffix(".0"), arch.layers):
        if f"{layers}.".startswith(f"{name}.") or name.startswith(f"{layers}."):
            return True
    relative = name.removeprefix(f"{arch.base}.")
    return any(linear.endswith(relative) or f"{relative}." in f"{linear}." for linear in arch.linear_names)
