"""An optimizer's steps: which samples each sees, how large it is, and the weights that they leave."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from mkaq.ranks import Ranks


@dataclass(frozen=True)
class Tuning:
    """How layers are tuned.

    Attributes:
        steps: Optimizer steps per layer.
        learning_rate: AdamW's learning rate; `auto` is 0.25 / hidden_size.
        batch_size: Largest number of sequences per step.
        seed: Seed of the order of the samples.
    """

    steps: int
    learning_rate: float | Literal["auto"]
    batch_size: int
    seed: int

    def rate(self, hidden: int) -> float:
        """The learning rate for layers of a width."""
        return 0.25 / hidden if self.learning_rate == "auto" else self.learning_rate


def descend(
    optimizer: torch.optim.Optimizer,
    steps: int,
    orders: Iterator[torch.Tensor],
    backward: Callable[[torch.Tensor], None],
    ranks: Ranks,
) -> Iterator[int]:
    """Takes steps along the gradients of all processes, each group of parameters clipped to a norm of 1.

    Args:
        optimizer: The optimizer; its learning rates follow `schedule`.
        steps: The number of steps.
        orders: This process's sample numbers of each step.
        backward: Adds the gradients of the mean loss of some samples.
        ranks: The processes.

    Yields:
        The number of each step, from 1, once it is taken.
    """
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))
    for step, chosen in zip(range(1, steps + 1), orders, strict=False):
        backward(chosen)
        for group in optimizer.param_groups:
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in group["params"]]
            ranks.average(len(chosen), *gradients)
            for parameter, gradient in zip(group["params"], gradients, strict=True):
                parameter.grad = gradient
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        yield step


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


def rounded_weights(layer: nn.Module, saved: torch.dtype, computed: torch.dtype) -> dict[str, torch.Tensor]:
    """Copies of a layer's weights as they are after saving, in the type that computes."""
    return {name: p.detach().to(saved).to(computed, copy=True) for name, p in layer.named_parameters()}


def with_weights(layer: nn.Module, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """A copy of a layer with other weights."""
    twin = copy.deepcopy(layer)
    twin.load_state_dict(weights, strict=False, assign=True)
    return twin.requires_grad_(False)


def settle(layer: nn.Module, weights: Mapping[str, torch.Tensor], ranks: Ranks) -> None:
    """Gives a layer the first process's weights, in place; it learns no more."""
    same = {name: ranks.broadcast_tensor(weight.contiguous()) for name, weight in weights.items()}
    layer.load_state_dict(same, strict=False, assign=True)
    layer.requires_grad_(False)
