"""The end of the model tuned toward what the source predicts: the last layer, and the final norm.

Layers are tuned toward hidden states, each alone. No layer comes after the last one: what counts is what the
head makes of it. Its weights and a factor for each feature of the final norm minimize KL(source || model) of
the next token. The layers before stay as they are, so their output is computed once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from mkaq.checkpoint.reader import Checkpoint
from mkaq.fit.final_norm import norm_error
from mkaq.fit.hold_out import Samples
from mkaq.recover.steps import Tuning, descend, rounded_weights, settle, shuffled, with_weights
from mkaq.walk.batches import batch_size
from mkaq.walk.walk import LayerWalk

STEPS = 48  # at most
STEP = 2048  # tokens per step, of all processes
CHECKS = 3  # times that held-out tokens decide
HELD_OUT = 6_144  # tokens that decide, of all processes
_NORM_RATE = 1e-2  # of the logarithms of the factors
LOGITS = 1 << 24  # numbers at once


@dataclass(frozen=True)
class Ending:
    """The outcome; without an effect on held-out tokens all weights stay, and both values are the same.

    Attributes:
        norm: The final norm's weight, shape (hidden_size,), in the type of the checkpoint.
        divergence_before: KL(source || model) per held-out token in nats, before tuning.
        divergence: The same with the tuned weights.
        steps: The step with the lowest divergence; 0 if the weights stay.
    """

    norm: torch.Tensor
    divergence_before: float
    divergence: float
    steps: int


@dataclass(frozen=True)
class TunedNorm:
    """A final norm with a factor for each feature, of its own; all values are of held-out tokens.

    Attributes:
        error_before: sum |t - f|^2 / sum |t|^2 of normed states, with the weight before tuning.
        error: The same with the tuned weight.
        divergence_before: As in `Ending`.
        divergence: As in `Ending`.
    """

    error_before: float
    error: float
    divergence_before: float
    divergence: float


def tuned_norm(
    source: LayerWalk,
    walk: LayerWalk,
    original: torch.Tensor,
    states: torch.Tensor,
    samples: Samples,
    ending: Ending,
) -> TunedNorm:
    """Measures a tuned norm on last hidden states, shape (samples, length, hidden_size); see `norm_error`."""
    norm = NormFactors(walk.checkpoint, ending.norm.dtype)
    before, after = (
        norm_error(source, walk, original, states, samples, norm.factors(weight).to(walk.device))
        for weight in (norm.stored(), ending.norm)
    )
    return TunedNorm(before, after, ending.divergence_before, ending.divergence)


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
    """Tunes the last layer in place, and the weight of the final norm.

    Args:
        source: The walk over the original model.
        walk: A walk over a checkpoint with the model's final norm and head.
        layer: The last layer, with its weights on the device.
        inputs: The output of the layers before it, shape (samples, length, hidden_size).
        original: Last hidden states of the original, of the same shape.
        samples: The samples, some of them held out.
        tuning: How: the layer's learning rate, and the largest number of steps.
        dtype: Type of the saved weights.
    """
    ranks, taken = walk.ranks, min(tuning.steps, STEPS)
    norm = NormFactors(walk.checkpoint, dtype)
    with ExitStack() as heads:
        logits = [heads.enter_context(each.head()) for each in (source, walk)]
        model = _Model(source, walk, logits, original, inputs)
        held = range(samples.num_train, len(samples.tokens))[: model.share(HELD_OUT)]
        best = norm.stored(), rounded_weights(layer, dtype, walk.dtype), 0
        before = lowest = model.divergence(held, layer, norm.factors(best[0]).to(walk.device))
        logs = torch.zeros(walk.checkpoint.sizes.hidden, device=walk.device).requires_grad_()
        layer.float().requires_grad_(True)
        groups: list[dict[str, Any]] = [
            {"params": list(layer.parameters())},
            {"params": [logs], "lr": _NORM_RATE},
        ]
        optimizer = torch.optim.AdamW(groups, tuning.rate(inputs.shape[-1]), (0.9, 0.95), weight_decay=0.0)
        orders = shuffled(samples.num_train, model.share(STEP), tuning.seed)
        backward = partial(model.backward, layer=layer, logs=logs)
        for step in descend(optimizer, taken, orders, backward, ranks):
            if step % math.ceil(taken / CHECKS) == 0 or step == taken:
                weights = rounded_weights(layer, dtype, walk.dtype)
                stored = norm.stored(ranks.broadcast_tensor(logs.detach().exp()).cpu())
                factors = norm.factors(stored).to(walk.device)
                divergence = model.divergence(held, with_weights(layer, weights), factors)
                if ranks.broadcast(divergence < lowest):
                    lowest, best = divergence, (stored, weights, step)
    settle(layer, best[1], ranks)
    return Ending(best[0], before, lowest, best[2])


class NormFactors:
    """The factors of a final norm: what its output is multiplied by.

    Args:
        checkpoint: The checkpoint whose norm has factors of 1.
        dtype: Type of the saved weight.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        name = checkpoint.arch.final_norm_weight
        self._offset, self._dtype = checkpoint.arch.norm_offset, dtype
        self._whole = checkpoint.read([name])[name].double() + self._offset

    def stored(self, factors: torch.Tensor | float = 1.0) -> torch.Tensor:
        """The weight to save for these factors, shape (hidden_size,)."""
        return (self._whole * factors - self._offset).to(self._dtype)

    def factors(self, stored: torch.Tensor) -> torch.Tensor:
        """The factors of a saved weight, float32: rounding has changed them."""
        ratio = torch.where(self._whole != 0, (stored.double() + self._offset) / self._whole, 1.0)
        return ratio.float()


@dataclass(frozen=True)
class _Model:
    """The heads of both models, the source's last hidden states and the last layer's inputs."""

    source: LayerWalk
    walk: LayerWalk
    logits: Sequence[Callable[..., torch.Tensor]]
    original: torch.Tensor
    inputs: torch.Tensor

    def share(self, tokens: int) -> int:
        """The samples of one process, if those of all have so many tokens."""
        return max(1, tokens // (max(1, self.inputs.shape[1]) * self.walk.ranks.size))

    def backward(self, rows: torch.Tensor, layer: nn.Module, logs: torch.Tensor) -> None:
        """Adds the gradients of the mean KL(source || model) of some samples.

        Args:
            rows: Their numbers; a process may have none.
            layer: The last layer.
            logs: The logarithms of the norm's factors, shape (hidden_size,).
        """
        tokens = len(rows) * self.inputs.shape[1]
        for part in torch.split(rows, batch_size(self.inputs)) if len(rows) else ():
            with self._autocast():
                output = self.walk.run(layer, self.walk.num_layers - 1, self.inputs[part])
            leaf = output.detach().requires_grad_()  # so that the logits of few tokens are kept at a time
            for divergence in self._divergences(part, leaf, logs):
                (divergence.sum() / tokens).backward()  # type: ignore[no-untyped-call]
            output.backward(leaf.grad)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def divergence(self, rows: range, layer: nn.Module, factors: torch.Tensor) -> float:
        """The mean of KL(source || model) over the tokens of some samples of all processes."""
        total, count = 0.0, 0
        for row in rows:
            output = self.walk.run(layer, self.walk.num_layers - 1, self.inputs[row : row + 1])
            for divergence in self._divergences(torch.tensor([row]), output, factors.log()):
                total, count = total + float(divergence.double().sum()), count + divergence.numel()
        return self.walk.ranks.mean(total / max(1, count), count)

    def _divergences(
        self, rows: torch.Tensor, output: torch.Tensor, logs: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """KL(source || model) of every token of some samples, some tokens at a time."""
        source_logits, own_logits = self.logits
        piece = max(1, LOGITS // self.walk.checkpoint.sizes.vocabulary)
        pair = (self.walk.to_device(self.original[rows]).flatten(0, 1), output.flatten(0, 1))
        for target, own in zip(*(torch.split(x, piece) for x in pair), strict=True):
            with self._autocast():
                with torch.no_grad():
                    wanted = source_logits(target[None]).float().log_softmax(-1)
                told = own_logits(own[None], logs.exp()).float().log_softmax(-1)
            yield (wanted.exp() * (wanted - told)).sum(-1)

    def _autocast(self) -> torch.autocast:
        device = self.walk.device
        return torch.autocast(device.type, torch.bfloat16, enabled=self.walk.ranks.has_fast_bfloat16(device))
