"""A step of a model that learns a source's predictions, in two ways with the same result.

`together`: all layers are on the device, and gradients pass through them as usual. `in_turn`: one layer is,
with its optimizer's state. Forward, the input of every layer is kept; backward, from the last layer to the
first, each is run again from its input, its weights take their step at once, and the gradient of its input
goes to the layer before. What is kept lies where hidden states lie: in memory, then in files.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import nn

from mkaq.distill.learner import Learner
from mkaq.distill.loss import LOGITS, Predictions, divergence, next_token_loss
from mkaq.walk.batches import spans
from mkaq.walk.walk import LayerWalk


class Lesson(NamedTuple):
    """What one process learns from in a step.

    Attributes:
        tokens: Token ids, shape (samples, length).
        learned: Which predictions count, of the same shape.
        told: The source's predictions, shape (samples * length, ...).
    """

    tokens: torch.Tensor
    learned: torch.Tensor
    told: Predictions

    @property
    def learns(self) -> int:
        """The number of predictions that count."""
        return int(self.learned.sum())


class Student:
    """A model that learns.

    Args:
        walk: A walk over it, in float32.
        learners: Its layers.
        norm: Its final norm.
        logits: Its output layer, from the final norm's output.
        cross_entropy: The weight of the loss on the text's own next tokens; the divergence has the rest.
    """

    def __init__(
        self,
        walk: LayerWalk,
        learners: Sequence[Learner],
        norm: nn.Module,
        logits: Callable[[torch.Tensor], torch.Tensor],
        cross_entropy: float = 0.0,
    ) -> None:
        self._walk, self._learners, self._norm, self._logits = walk, learners, norm, logits
        self._cross_entropy = cross_entropy

    def together(self, lesson: Lesson, number: int, rate: float) -> float:
        """A step with all layers on the device; returns the mean loss of this process in nats.

        Args:
            lesson: What is learned.
            number: The number of the step, from 1.
            rate: The learning rate.
        """
        states, loss = self._walk.embed(lesson.tokens), 0.0
        with ExitStack() as stack:
            layers = [stack.enter_context(learner.placed()) for learner in self._learners]
            for rows in spans(states):
                output = states[rows]
                for index, layer in enumerate(layers):
                    output = self._run(layer, index, output)
                slope, part = self._end(output, lesson, rows)
                output.backward(slope)  # type: ignore[no-untyped-call]
                loss += part
            for learner, layer in zip(self._learners, layers, strict=True):
                learner.step(layer, number, rate, lesson.learns)
        self._walk.activations.recycle(states)
        return loss

    def in_turn(self, lesson: Lesson, number: int, rate: float) -> float:
        """The same step with one layer on the device at a time; arguments and result as for `together`."""
        activations = self._walk.activations
        states, inputs, loss = self._walk.embed(lesson.tokens), list[torch.Tensor](), 0.0
        for index, learner in enumerate(self._learners):
            inputs.append(activations.copy(states))
            with learner.placed() as layer, torch.no_grad():
                for rows in spans(states):
                    states[rows] = self._run(layer, index, states[rows])
        slopes = states  # each is read before it is replaced
        for rows in spans(states):
            slopes[rows], part = self._end(states[rows], lesson, rows)
            loss += part
        for index, learner in reversed(list(enumerate(self._learners))):
            kept = inputs.pop()
            with learner.placed() as layer:
                for rows in spans(kept):
                    leaf = self._walk.to_device(kept[rows]).detach().clone().requires_grad_()
                    output = self._run(layer, index, leaf)
                    output.backward(self._walk.to_device(slopes[rows]))  # type: ignore[no-untyped-call]
                    assert leaf.grad is not None
                    slopes[rows] = leaf.grad
                    activations.release()
                learner.step(layer, number, rate, lesson.learns)
            activations.recycle(kept)
        activations.recycle(slopes)
        return loss

    @torch.no_grad()
    def divergences(self, lesson: Lesson, dtype: torch.dtype) -> torch.Tensor:
        """KL(source || model) of every prediction of this process, its weights as saved in a type.

        Returns:
            Shape (samples, length), float32, on the CPU.
        """
        states = self._walk.embed(lesson.tokens)
        for index, learner in enumerate(self._learners):
            layer = self._walk.assemble(index, learner.saved(dtype))
            for rows in spans(states):
                states[rows] = self._run(layer, index, states[rows])
        found = torch.empty(lesson.tokens.shape)
        for rows in spans(states):
            for at, logits, told in self._pieces(states[rows], lesson, rows):
                found.view(-1)[at] = divergence(logits, told)[0].cpu()
        self._walk.activations.recycle(states)
        return found

    def _end(self, states: torch.Tensor, lesson: Lesson, rows: slice) -> tuple[torch.Tensor, float]:
        """The slope of the mean loss by last hidden states, and some samples' part of that loss."""
        leaf = self._walk.to_device(states).detach().requires_grad_()
        total, count = 0.0, max(1, lesson.learns)
        for at, logits, told in self._pieces(leaf, lesson, rows):
            counts = lesson.learned.view(-1)[at].to(logits.device)[:, None] / count
            with torch.no_grad():
                loss, slope = self._loss(logits, told, lesson, at)
                total += float((loss.double() * counts[:, 0]).sum())
            logits.backward((slope * counts).to(logits.dtype))  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        return leaf.grad, total

    def _loss(
        self, logits: torch.Tensor, told: Predictions, lesson: Lesson, at: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each prediction; what follows a sample's last token is unknown: there the divergence counts."""
        loss, slope = divergence(logits, told)
        if self._cross_entropy:
            following = lesson.tokens.roll(-1, 1)
            weight = torch.full(following.shape, self._cross_entropy)
            weight[:, -1] = 0.0
            following, weight = (each.view(-1)[at].to(logits.device) for each in (following, weight))
            text_loss, text_slope = next_token_loss(logits, following.long())
            loss, slope = loss.lerp(text_loss, weight), slope.lerp_(text_slope, weight[:, None])
        return loss, slope

    def _pieces(
        self, states: torch.Tensor, lesson: Lesson, rows: slice
    ) -> Iterator[tuple[slice, torch.Tensor, Predictions]]:
        """Few predictions of some samples at a time: where they are in the lesson, logits, the source's."""
        length = lesson.tokens.shape[1]
        flat, first = self._walk.to_device(states).flatten(0, 1), rows.start * length
        size = max(1, LOGITS // self._walk.checkpoint.sizes.vocabulary)
        for start in range(0, len(flat), size):
            piece = flat[start : start + size]
            at = slice(first + start, first + start + len(piece))
            with self._walk.autocast():
                logits = self._logits(self._norm(piece[None]).float())[0]
            told = Predictions(*(tensor[at] for tensor in lesson.told)).to(logits.device)
            yield at, logits, told

    def _run(self, layer: nn.Module, index: int, states: torch.Tensor) -> torch.Tensor:
        with self._walk.autocast():
            return self._walk.run(layer, index, states).float()
