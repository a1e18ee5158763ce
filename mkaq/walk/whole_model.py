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


@torch.no_grad()
def generate(model: Any, input_ids: torch.Tensor, max_new_tokens: int, stop: set[int]) -> list[int]:
    """Greedy generation with a KV cache.

    Args:
        model: The result of `whole_model`.
        input_ids: Shape (1, length), at least one token.
        max_new_tokens: The maximum number of new tokens.
        stop: Tokens that end the text.

    Returns:
        The new tokens, without the one that ended the text.
    """
    new: list[int] = []
    cache, inputs = None, input_ids
    for _ in range(max_new_tokens):
        output = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        token = int(output.logits[0, -1].argmax())
        if token in stop:
            break
        new.append(token)
        inputs = torch.tensor([[token]], device=input_ids.device)
    return new
