"""One linear layer to bitsandbytes int8 or 4-bit and back, through the library's own modules."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mkaq.recipe import BitsandbytesSection


def quantize_linear(
    weight: torch.Tensor, section: BitsandbytesSection, device: torch.device
) -> dict[str, torch.Tensor]:
    """Quantizes a weight as transformers would store it.

    Args:
        weight: Shape (out_features, in_features).
        section: Bits and code.
        device: Where the library does it.

    Returns:
        Tensors by their names below the module: `weight` and its scales.

    Raises:
        OverflowError: If a weight is too large for the type in which the library reads it.
    """
    import bitsandbytes as bnb

    out_features, in_features = weight.shape
    linear: nn.Module
    if section.bits == 8:
        linear = bnb.nn.Linear8bitLt(in_features, out_features, bias=False, has_fp16_weights=False)
        half = weight.to(torch.float16)
        if not bool(torch.isfinite(half).all()):
            raise OverflowError("weights beyond float16, in which bitsandbytes reads them for int8")
        linear.load_state_dict({"weight": half})
    else:
        linear = bnb.nn.Linear4bit(
            in_features,
            out_features,
            bias=False,
            quant_type=section.quant_type,
            compress_statistics=section.double_quant,
        )
        linear.load_state_dict({"weight": weight})
    return {name: tensor.detach().cpu() for name, tensor in linear.to(device).state_dict().items()}


def quantization_config(section: BitsandbytesSection, checkpoint_dtype: torch.dtype) -> dict[str, Any]:
    """The `quantization_config` that makes transformers load what `quantize_linear` wrote."""
    compute = section.compute_dtype
    if compute in (None, "auto"):
        compute = str(checkpoint_dtype).removeprefix("torch.")  # type: ignore[assignment]
    four = section.bits == 4
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "bnb_4bit_quant_type": section.quant_type or "fp4",
        "bnb_4bit_use_double_quant": bool(section.double_quant),
        "bnb_4bit_compute_dtype": compute if four else "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_skip_modules": ["lm_head"],
    }


def restore_linear(
    tensors: Mapping[str, torch.Tensor], like: nn.Linear, config: Mapping[str, Any], device: torch.device
) -> nn.Module:
    """The library's module for a stored layer: it multiplies as a serving runtime does.

    Args:
        tensors: What `quantize_linear` returned, and `bias` where the layer has one.
        like: The layer that it replaces, for its shape.
        config: The checkpoint's quantization_config.
        device: Where it will run.

    Raises:
        ValueError: If the tensors or the configuration do not fit together (other errors of the
            library are possible too).
    """
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
            quantized_stats={
                f"weight.{k.removeprefix('weight.')}": v
                for k, v in tensors.items()
                if k.startswith("weight.")
            },
            requires_grad=False,
            device=device,
            module=linear,
        )
        _check_state(linear.weight.quant_state, like.weight.shape, config["bnb_4bit_quant_type"])
    if "bias" in tensors:
        linear.bias = nn.Parameter(tensors["bias"].to(device), requires_grad=False)
    return linear.eval()  # type: ignore[no-any-return]


def _check_rows(tensors: Mapping[str, torch.Tensor]) -> None:
    """The library has had other orders than row by row for int8, told by a number beside the codes."""
    if "weight_format" in tensors and int(tensors["weight_format"]) != 0:
        raise ValueError(f"weight_format {int(tensors['weight_format'])} is not row by row")


def _check_state(state: Any, shape: torch.Size, quant_type: str) -> None:
    """What is stored beside the codes must be as config.json has it; scales that are too few are overrun."""
    weights = shape.numel()
    if tuple(state.shape) != tuple(shape) or state.quant_type != quant_type:
        told = f"{state.quant_type} of shape {list(state.shape)}"
        raise ValueError(f"codes say {told}, config.json {quant_type} of shape {list(shape)}")
    if state.absmax.numel() != -(-weights // state.blocksize):
        raise ValueError(f"{state.absmax.numel()} scales for {weights} weights")
    if state.nested and state.state2.absmax.numel() != -(-state.absmax.numel() // state.state2.blocksize):
        raise ValueError(f"{state.state2.absmax.numel()} scales for {state.absmax.numel()} scales")


def dequantize_linear(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> torch.Tensor:
    """The weight that a stored layer stands for, float32, shape (out_features, in_features)."""
    from bitsandbytes import functional

    if config.get("load_in_8bit"):
        _check_rows(tensors)
        return tensors["weight"].float() * tensors["SCB"].float().unsqueeze(1) / 127.0
    state = functional.QuantState.from_dict(
        {k: v for k, v in tensors.items() if k.startswith("weight.")}, torch.device("cpu")
    )
    dense: torch.Tensor = functional.dequantize_4bit(tensors["weight"], state)
    return dense.float()
