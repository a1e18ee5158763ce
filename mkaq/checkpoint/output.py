"""How a stage writes a checkpoint."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from mkaq.errors import UnsupportedError
from mkaq.progress import Progress


class Output(NamedTuple):
    """How a checkpoint is written.

    Attributes:
        dtype: The dtype of the tensors that stay dense.
        shard_size: Data bytes per file.
        progress: Shows every layer.
    """

    dtype: torch.dtype
    shard_size: int
    progress: Progress


def with_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A config.json that names this dtype, under the newer of its two keys alone."""
    result = {**config, "dtype": str(dtype).removeprefix("torch.")}
    result.pop("torch_dtype", None)
    return result


def cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Converts a tensor to another dtype.

    Raises:
        UnsupportedError: If its values overflow that dtype.
    """
    result = tensor.to(dtype)
    if dtype == torch.float16 and not bool(torch.isfinite(result).all()):
        raise UnsupportedError(
            f"{name} has values beyond float16", where="model.dtype", fix="use bfloat16 or float32"
        )
    return result
