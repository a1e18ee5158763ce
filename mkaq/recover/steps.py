"""An optimizer's steps: which samples each sees, how large it is, and the weights that they leave."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import nn

from mkaq.ranks import Ranks
from mkaq.walk.walk import LayerWalk

BETAS = (0.9, 0.95)  # of AdamW


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


class Descent(NamedTuple):
    """How a layer was tuned.

    Attributes:
        before: The error of its weights before.
        error: The lowest error, that of its weights now.
        step: The step that had it; 0 if the weights are those before.
    """

    before: float
    error: float
    step: int


def descend(
    walk: LayerWalk,
    layer: nn.Module,
    dtype: torch.dtype,
    orders: Iterator[torch.Tensor],
    backward: Callable[[torch.Tensor], None],
    error_of: Callable[[nn.Module], float],
    *,
    steps: int,
    learning_rate: float,
    checks: int,
) -> Descent:
    """Tunes a layer in place; leaves the weights of the lowest error, rounded to `dtype`.

    AdamW without weight decay, along the gradients of all processes, clipped to a norm of 1; the learning
    rate follows `schedule`.

    Args:
        walk: The walk that the layer belongs to.
        layer: The layer, with its weights on the device.
        dtype: Type of the saved weights.
        orders: This process's sample numbers of each step.
        backward: Adds the gradients of the mean loss of some samples.
        error_of: The error of a layer with other weights, on held-out samples.
        steps: The number of steps.
        learning_rate: The peak learning rate.
        checks: How many times the error is measured.
    """
    before = lowest = error_of(layer)
    if walk.ranks.broadcast(before == 0):
        return Descent(0.0, 0.0, 0)
    best, best_step = rounded_weights(layer, dtype, walk.dtype), 0
    layer.float().requires_grad_(True)
    optimizer = torch.optim.AdamW(layer.parameters(), learning_rate, BETAS, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))
    for step, chosen in zip(range(1, steps + 1), orders, strict=False):
        backward(chosen)
        share_gradients(list(layer.parameters()), len(chosen), walk.ranks)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % math.ceil(steps / checks) == 0 or step == steps:
            rounded = rounded_weights(layer, dtype, walk.dtype)
            error = error_of(with_weights(layer, rounded))
            if walk.ranks.broadcast(error < lowest):
                lowest, best, best_step = error, rounded, step
    best = {name: walk.ranks.broadcast_tensor(weight.contiguous()) for name, weight in best.items()}
    layer.load_state_dict(best, strict=False, assign=True)
    layer.requires_grad_(False)
    return Descent(before, lowest, best_step)


def share_gradients(parameters: Sequence[nn.Parameter], count: int, ranks: Ranks) -> None:
    """Replaces gradients by those of all processes, clipped to a norm of 1; one that is missing is 0.

    Args:
        parameters: They have the gradients.
        count: The items of this process, over which its gradients are a mean.
        ranks: The processes.
    """
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    ranks.average(count, *gradients)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    nn.utils.clip_grad_norm_(parameters, 1.0)


def schedule(step: int, steps: int, least: int = 1) -> float:
    """The fraction of the learning rate at a step: linear warm-up over the first 1/20, then a cosine to 0.

    Args:
        step: The step, from 0.
        steps: The number of steps.
        least: Steps of the warm-up at least, if that is not more than half of all.
    """
    warmup = max(1, steps // 20, min(least, steps // 2))
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
