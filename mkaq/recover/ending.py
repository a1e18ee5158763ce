"""The last layer tuned toward what the source predicts.

Layers are tuned toward hidden states, each alone. No layer comes after the last one: what counts is what the
head makes of it. It minimizes KL(source || model) of the next token. The layers before stay as they are, so
their output is computed once. Predictions tie a layer to its text more than hidden states do, so the
sequences in random order come more often, and steps are shorter: what is gained on the calibration's domain
must not be lost on another (docs/quality.md).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from mkaq.fit.hold_out import Samples
from mkaq.fit.shuffle import SHUFFLED
from mkaq.recover.steps import Descent, Tuning, descend, shuffled
from mkaq.walk.batches import batch_size
from mkaq.walk.walk import LayerWalk

STEPS = 48  # at most
STEP = 2048  # tokens per step, of all processes
REPEATED = 4  # times that a sequence in random order comes more often
RATE = 0.3  # of the learning rate
CHECKS = 3  # times that held-out tokens decide
HELD_OUT = 6_144  # tokens that decide, of all processes
LOGITS = 1 << 24  # numbers at once


def tune_ending(
    source: LayerWalk,
    walk: LayerWalk,
    layer: nn.Module,
    inputs: torch.Tensor,
    original: torch.Tensor,
    samples: Samples,
    tuning: Tuning,
    dtype: torch.dtype,
) -> Descent:
    """Tunes the last layer in place; the error is KL(source || model) per held-out token, in nats.

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
    rows = _repeated(samples)
    fast = walk.ranks.has_fast_bfloat16(walk.device)
    head = source.unembedding(torch.bfloat16 if fast else torch.float32)  # nothing changes it: one is enough
    with source.final_norm() as source_norm, walk.final_norm() as own_norm, head as logits:
        model = _Model(walk, (source_norm, own_norm), logits, original, inputs)
        held = range(samples.num_train, len(samples.tokens))[: model.share(HELD_OUT)]
        return descend(
            walk,
            layer,
            dtype,
            (rows[chosen] for chosen in shuffled(len(rows), model.share(STEP), tuning.seed)),
            partial(model.backward, layer),
            partial(model.divergence, held),
            steps=min(tuning.steps, STEPS),
            learning_rate=RATE * tuning.rate(inputs.shape[-1]),
            checks=CHECKS,
        )


def _repeated(samples: Samples) -> torch.Tensor:
    """The numbers of the samples to learn from, those in random order several times."""
    rows = torch.arange(samples.num_train)
    disordered = rows[(rows + samples.first) % SHUFFLED == SHUFFLED - 1]
    return torch.cat([rows, *[disordered] * REPEATED])


@dataclass(frozen=True)
class _Model:
    """The final norms of source and model, their head, and what the last layer should write and gets."""

    walk: LayerWalk
    norms: tuple[nn.Module, nn.Module]
    logits: Callable[[torch.Tensor], torch.Tensor]
    original: torch.Tensor
    inputs: torch.Tensor

    def share(self, tokens: int) -> int:
        """The samples of one process, if those of all have so many tokens."""
        return max(1, tokens // (max(1, self.inputs.shape[1]) * self.walk.ranks.size))

    def backward(self, layer: nn.Module, rows: torch.Tensor) -> None:
        """Adds the gradients of the mean KL(source || model) of some samples; a process may have none."""
        tokens = len(rows) * self.inputs.shape[1]
        for part in torch.split(rows, batch_size(self.inputs)) if len(rows) else ():
            with self.walk.autocast():
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
        source_norm, own_norm = self.norms
        piece = max(1, LOGITS // self.walk.checkpoint.sizes.vocabulary)
        pair = (self.walk.to_device(self.original[rows]).flatten(0, 1), output.flatten(0, 1))
        for target, own in zip(*(torch.split(x, piece) for x in pair), strict=True):
            with self.walk.autocast():
                with torch.no_grad():
                    wanted = self._predictions(source_norm, target)
                told = self._predictions(own_norm, own)
            yield (wanted.exp() * (wanted - told)).sum(-1)

    def _predictions(self, norm: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the next token after last hidden states, shape (1, tokens, vocabulary)."""
        return self.logits(norm(states[None]).float()).float().log_softmax(-1)
