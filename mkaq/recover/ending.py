"""The last layer tuned toward what the source predicts.

Layers are tuned toward hidden states, each alone. No layer comes after the last one: what counts is what the
head makes of it. It minimizes KL(source || model) of the next token. The layers before stay as they are, so
their output is computed once. Predictions tie a layer to its text more than hidden states do, so the
sequences in random order come more often, and steps are shorter: what is gained on the calibration's domain
must not be lost on another (docs/quality.md).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from mkaq.fit.hold_out import Samples
from mkaq.fit.shuffle import SHUFFLED
from mkaq.recover.steps import Tuning, descend, rounded_weights, settle, shuffled, with_weights
from mkaq.walk.batches import batch_size
from mkaq.walk.walk import LayerWalk

STEPS = 48  # at most
STEP = 2048  # tokens per step, of all processes
REPEATED = 4  # times that a sequence in random order comes more often
RATE = 0.3  # of the learning rate
CHECKS = 3  # times that held-out tokens decide
HELD_OUT = 6_144  # tokens that decide, of all processes
LOGITS = 1 << 24  # numbers at once


class Ending(NamedTuple):
    """The outcome; without an effect on held-out tokens the weights stay, and both values are the same.

    Attributes:
        divergence_before: KL(source || model) per held-out token in nats, before tuning.
        divergence: The same with the tuned weights.
        steps: The step with the lowest divergence; 0 if the weights stay.
    """

    divergence_before: float
    divergence: float
    steps: int


def tune_ending(
    source: LayerWalk,
    walk: LayerWalk,
    layer: nn.Module,
    inputs: torch.Tensor,
    original: torch.Tensor,
    samples: Samples,
    tuning: Tuning,
    dtype: torch.dtype,
) -> Ending:
    """Tunes the last layer in place.

    Args:
        source: The walk over the original model.
        walk: A walk over a checkpoint with the model's final norm and head.
        layer: The last layer, with its weights on the device.
        inputs: The output of the layers before it, shape (samples, length, hidden_size).
        original: Last hidden states of the original, of the same shape.
        samples: The samples, some of them held out.
        tuning: How: the learning rate, and the largest number of steps.
        dtype: Type of the saved weights.
    """
    ranks, taken = walk.ranks, min(tuning.steps, STEPS)
    with ExitStack() as heads:
        logits = [heads.enter_context(each.head()) for each in (source, walk)]
        model = _Model(source, walk, logits, original, inputs)
        held = range(samples.num_train, len(samples.tokens))[: model.share(HELD_OUT)]
        best, best_step = rounded_weights(layer, dtype, walk.dtype), 0
        before = lowest = model.divergence(held, layer)
        layer.float().requires_grad_(True)
        optimizer = torch.optim.AdamW(
            layer.parameters(), RATE * tuning.rate(inputs.shape[-1]), (0.9, 0.95), weight_decay=0.0
        )
        rows = _repeated(samples)
        orders = (rows[chosen] for chosen in shuffled(len(rows), model.share(STEP), tuning.seed))
        for step in descend(optimizer, taken, orders, partial(model.backward, layer), ranks):
            if step % math.ceil(taken / CHECKS) == 0 or step == taken:
                weights = rounded_weights(layer, dtype, walk.dtype)
                divergence = model.divergence(held, with_weights(layer, weights))
                if ranks.broadcast(divergence < lowest):
                    lowest, best, best_step = divergence, weights, step
    settle(layer, best, ranks)
    return Ending(before, lowest, best_step)


def _repeated(samples: Samples) -> torch.Tensor:
    """The numbers of the samples to learn from, those in random order several times."""
    rows = torch.arange(samples.num_train)
    disordered = rows[(rows + samples.first) % SHUFFLED == SHUFFLED - 1]
    return torch.cat([rows, *[disordered] * REPEATED])


@dataclass(frozen=True)
class _Model:
    """The heads of both models, the source's last hidden states and the last layer's inputs."""

    source: LayerWalk
    walk: LayerWalk
    logits: Sequence[Callable[[torch.Tensor], torch.Tensor]]
    original: torch.Tensor
    inputs: torch.Tensor

    def share(self, tokens: int) -> int:
        """The samples of one process, if those of all have so many tokens."""
        return max(1, tokens // (max(1, self.inputs.shape[1]) * self.walk.ranks.size))

    def backward(self, layer: nn.Module, rows: torch.Tensor) -> None:
        """Adds the gradients of the mean KL(source || model) of some samples; a process may have none."""
        tokens = len(rows) * self.inputs.shape[1]
        for part in torch.split(rows, batch_size(self.inputs)) if len(rows) else ():
            with self._autocast():
                output = self.walk.run(layer, self.walk.num_layers - 1, self.inputs[part])
            leaf = output.detach().requires_grad_()  # so that the logits of few tokens are kept at a time
            for divergence in self._divergences(part, leaf):
                (divergence.sum() / tokens).backward()  # type: ignore[no-untyped-call]
            output.backward(leaf.grad)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def divergence(self, rows: range, layer: nn.Module) -> float:
        """The mean of KL(source || model) over the tokens of some samples of all processes."""
        total, count = 0.0, 0
        for row in rows:
            output = self.walk.run(layer, self.walk.num_layers - 1, self.inputs[row : row + 1])
            for divergence in self._divergences(torch.tensor([row]), output):
                total, count = total + float(divergence.double().sum()), count + divergence.numel()
        return self.walk.ranks.mean(total / max(1, count), count)

    def _divergences(self, rows: torch.Tensor, output: torch.Tensor) -> Iterator[torch.Tensor]:
        """KL(source || model) of every token of some samples, some tokens at a time."""
        source_logits, own_logits = self.logits
        piece = max(1, LOGITS // self.walk.checkpoint.sizes.vocabulary)
        pair = (self.walk.to_device(self.original[rows]).flatten(0, 1), output.flatten(0, 1))
        for target, own in zip(*(torch.split(x, piece) for x in pair), strict=True):
            with self._autocast():
                with torch.no_grad():
                    wanted = source_logits(target[None]).float().log_softmax(-1)
                told = own_logits(own[None]).float().log_softmax(-1)
            yield (wanted.exp() * (wanted - told)).sum(-1)

    def _autocast(self) -> torch.autocast:
        device = self.walk.device
        return torch.autocast(device.type, torch.bfloat16, enabled=self.walk.ranks.has_fast_bfloat16(device))
