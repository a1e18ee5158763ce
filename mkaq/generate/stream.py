"""Generation with a KV cache, one token after another."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mkaq.generate.choice import likeliest
from mkaq.generate.pace import Pace


@torch.no_grad()
def stream(
    model: Any,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    stop: set[int],
    choose: Callable[[torch.Tensor], int] = likeliest,
    pace: Pace | None = None,
) -> Iterator[int]:
    """Yields new tokens as they come, without the one that ends the text.

    Args:
        model: The result of `whole_model`.
        input_ids: Shape (1, length), at least one token.
        max_new_tokens: The maximum number of new tokens.
        stop: Tokens that end the text.
        choose: From the last logits to a token.
        pace: Where the speed is noted.
    """
    pace = pace or Pace()
    pace.prompt_tokens += input_ids.shape[1]
    cache, inputs = None, input_ids
    for count in range(max_new_tokens):
        began = time.perf_counter()
        output = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        token = choose(output.logits[0, -1])
        if count:
            pace.seconds += time.perf_counter() - began
        else:
            pace.prompt_seconds += time.perf_counter() - began
        if token in stop:
            return
        pace.tokens += 1
        yield token
        inputs = torch.tensor([[token]], device=input_ids.device)
