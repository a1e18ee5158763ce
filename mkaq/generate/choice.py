"""The choice of the next token."""

from collections.abc import Callable

import torch

from mkaq.generate.sampling import Sampling


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
