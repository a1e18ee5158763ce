"""How a stage writes a checkpoint."""

from typing import NamedTuple

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
