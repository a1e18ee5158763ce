"""Floating-point dtypes by their names in safetensors, and devices with fast bfloat16."""

from collections.abc import Mapping

import torch

FLOATS: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
}
"""The floating-point dtypes that weights may have."""


DTYPES: Mapping[str, torch.dtype] = {
    **FLOATS,
    "I64": torch.int64,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""All types that tensors may have."""


def dtype_named(name: str) -> torch.dtype:
    """The dtype of a name such as `bfloat16`."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 natively, with float32 sums: every GPU, and some CPUs."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
