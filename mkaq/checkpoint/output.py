"""How a stage writes a checkpoint."""

from typing import NamedTuple

import torch

from mkaq.errors import UnsupportedError
from mkaq.progress import Progress


class Output(NamedTuple):
    """How a checkpoint is written.

    Attributes:
        dtype: Of the tensors that stay dense.
        shard_size: Bytes per file.
        progress: Told of every layer.
    """

    dtype: torch.dtype
    shard_size: int
    progress: Progress


def cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """A tensor in another type.

    Raises:
        UnsupportedError: If its values do not fit the type.
    """
    result = tensor.to(dtype)
    if dtype == torch.float16 and not bool(torch.isfinite(result).all()):
        raise UnsupportedError(
            f"{name} has values beyond float16", where="model.dtype", fix="use bfloat16 or float32"
        )
    return result
