"""Quantizes a linear layer to bitsandbytes int8 or 4-bit with the library's own modules."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mkaq.checkpoint.finite import all_finite


def quantize_linear(
    weight: torch.Tensor, config: Mapping[str, Any], device: torch.device
) -> dict[str, torch.Tensor]:
    """Quantizes a weight as transformers would store it.

    Args:
        weight: Shape (out_features, in_features).
        config: The checkpoint's quantization_config.
        device: Where the library computes.

    Returns:
        `weight` and its quantization state, by their names in the module.

    Raises:
        OverflowError: If a weight overflows the dtype in which the library reads it, or what it computes.
    """
    import bitsandbytes as bnb

    out_features, in_features = weight.shape
    linear: nn.Module
    if config["load_in_8bit"]:
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
            quant_type=config["bnb_4bit_quant_type"],
            compress_statistics=config["bnb_4bit_use_double_quant"],
        )
        linear.load_state_dict({"weight": weight})
    stored = {name: tensor.detach().cpu() for name, tensor in linear.to(device).state_dict().items()}
    if not all(all_finite(tensor) for tensor in stored.values() if tensor.is_floating_point()):
        raise OverflowError("weights so large that the sum of their scales overflows")
    return stored
