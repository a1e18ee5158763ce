"""Generation with a KV cache, one token after another, and how fast it was."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mkaq.generate.sampling import likeliest


@dataclass
class Pace:
    """The speed of a generation, filled in while it runs.

    Attributes:
        prompt_tokens: Tokens read.
        prompt_seconds: Time until the first new token.
        tokens: New tokens.
        seconds: Time for those after the first.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    tokens: int = 0
    seconds: float = 0.0

    def describe(self) -> str:
        """One line for people."""
        later = max(0, self.tokens - 1)
        speed = f", {later / self.seconds:.1f} tokens/s" if later and self.seconds else ""
        return (
            f"{self.prompt_tokens} tokens read in {self.prompt_seconds:.2f} s, {self.tokens} written{speed}"
        )


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
