"""A whole model in memory, for generation: all layers at once instead of one by one."""

from typing import Any

import psutil
import torch

from mkaq.checkpoint.reader import Checkpoint
from mkaq.errors import ResourceError
from mkaq.walk.walk import LayerWalk


def whole_model(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Any:
    """The model of transformers with every weight in place; GPTQ weights are made dense.

    Args:
        checkpoint: A dense, GPTQ or bitsandbytes checkpoint.
        device: Where it runs.
        dtype: The dtype it computes in.

    Raises:
        ResourceError: If it does not fit into memory.
    """
    check_fits(checkpoint, device, dtype)
    return LayerWalk(checkpoint, device, dtype).whole_model()


def check_fits(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    """Refuses a model that does not fit into memory.

    Raises:
        ResourceError: If the dense model is larger than the free memory.
    """
    needed = checkpoint.parameters * dtype.itemsize
    free = psutil.virtual_memory().available if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    if needed > free:
        raise ResourceError(
            f"the model needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free on {device}",
            where=checkpoint.path,
            fix="use a larger machine, or transformers, which keeps quantized weights as they are",
        )
