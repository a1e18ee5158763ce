"""The GPTQ linear layers of a checkpoint, one at a time, for formats that hold the same codes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from mkaq.checkpoint.reader import Checkpoint
from mkaq.errors import CheckpointError, UnsupportedError
from mkaq.formats.gptq import checkpoint_format
from mkaq.formats.packing import unpack

PARTS = ("qweight", "qzeros", "scales", "g_idx")


class Codes(NamedTuple):
    """A linear layer whose weight is scale * (code - zero), with groups of neighbouring columns.

    Attributes:
        words: The codes of every row, packed lowest bits first, int32, shape (out_features,
            in_features * bits / 32).
        scales: Shape (out_features, groups), in the checkpoint's type.
        zeros: int32, shape (out_features, groups).
    """

    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor


def codes_refusal(quantization: Mapping[str, Any] | None) -> str:
    """Why a format with neighbouring columns per group cannot hold a model's codes; empty if it can."""
    if quantization is None:
        return "it holds GPTQ codes, and nothing was quantized"
    if quantization.get("quant_method") != "gptq":
        return f"it holds GPTQ codes, not those of {quantization.get('quant_method')}"
    if quantization.get("desc_act"):
        return "it has no g_idx, and with desc_act and no static_groups the columns of a group lie apart"
    return ""


def read_codes(model: Checkpoint, name: str) -> Codes:
    """Reads a linear layer of a GPTQ checkpoint.

    Args:
        model: The checkpoint.
        name: The layer's full name.

    Raises:
        CheckpointError: If it cannot be read, or its zero points contradict `sym`.
        UnsupportedError: If the columns of a group lie apart, whatever `desc_act` says.
    """
    config = model.quantization or {}
    bits, size = config["bits"], config["group_size"]
    parts = {part: model.read([f"{name}.{part}"])[f"{name}.{part}"] for part in PARTS}
    columns = len(parts["g_idx"])
    if not torch.equal(parts["g_idx"], torch.arange(columns).div(columns if size == -1 else size).int()):
        raise UnsupportedError(f"the columns of a group of {name} lie apart", where=model.path)
    zeros = unpack(parts["qzeros"].T.contiguous(), bits) + (checkpoint_format(config) == "gptq")
    if config.get("sym") and not bool((zeros == 2 ** (bits - 1)).all()):
        raise CheckpointError(f"{name} has zero points off the middle, config.json has sym", where=model.path)
    return Codes(parts["qweight"].T.contiguous(), parts["scales"].T.contiguous(), zeros)
