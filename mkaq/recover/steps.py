"""The steps of an optimizer: which samples each sees, and how large it is."""

import math
from collections.abc import Iterator

import torch


def schedule(step: int, steps: int) -> float:
    """The fraction of the learning rate at a step: linear warm-up over the first 1/20, then a cosine to 0."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def shuffled(samples: int, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Yields batches of sample numbers without end: every sample once per epoch, in a new order each time."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    while True:
        order = torch.randperm(samples, generator=generator)
        full = max(1, samples // batch_size) * batch_size
        yield from torch.split(order[:full], batch_size)
