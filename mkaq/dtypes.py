"""Where matrix products in bfloat16 are the faster ones."""

import torch


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16, with float32 sums: every GPU, and some CPUs."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
