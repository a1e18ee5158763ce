"""The choice of the next token."""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Sampling(NamedTuple):
    """How the next token is chosen; the filters are those of transformers, in its order.

    Attributes:
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Only so many likeliest tokens; 0 for all.
        top_p: Only the likeliest tokens that together have this probability.
        min_p: Only tokens at least this likely, as a part of the likeliest one's probability.
        seed: Seed of the draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


def likeliest(logits: torch.Tensor) -> int:
    """The likeliest token; logits of shape (vocabulary,)."""
    return int(logits.argmax())


def chooser(sampling: Sampling) -> Callable[[torch.Tensor], int]:
    """A function from logits, shape (vocabulary,), to a token; successive draws differ."""
    from transformers import LogitsProcessorList
    from transformers.generation.logits_process import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    if sampling.temperature == 0:
        return likeliest
    filters = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        filters.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        filters.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        filters.append(MinPLogitsWarper(sampling.min_p))
    generator = torch.Generator().manual_seed(sampling.seed)

    def draw(logits: torch.Tensor) -> int:
        scores = filters(torch.empty(1, 0, dtype=torch.long), logits.float().cpu()[None])
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=generator))

    return draw
