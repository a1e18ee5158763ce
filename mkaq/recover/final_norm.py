"""The final norm tuned toward what the source predicts: a factor for each feature.

Layers are tuned toward hidden states, each alone; what is still missing at the end is missing unevenly. The
last norm can make each feature as loud as suits the predictions: it minimizes KL(source || model) of the next
token, by Adam on the logarithms of the factors. These are few numbers, so few tokens are enough.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from mkaq.fit.final_norm import norm_error
from mkaq.fit.hold_out import Samples
from mkaq.recover.steps import schedule, shuffled
from mkaq.walk.walk import LayerWalk

LEARNED = 24_576  # tokens to learn from, at most, of all processes
_STEPS = 24
_STEP = 2048  # tokens per step: all are seen twice
_HELD_OUT = 6_144  # tokens that decide
_LEARNING_RATE = 1e-2
LOGITS = 1 << 24  # numbers at once

Logits = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class TunedNorm:
    """The outcome; without an effect on held-out tokens the weight stays, and both errors are the same.

    Attributes:
        weight: The norm's weight, shape (hidden_size,), in the type of the checkpoint.
        error_before: sum |t - f|^2 / sum |t|^2 over held-out tokens, of normed states, before tuning.
        error: The same with `weight`.
        divergence_before: KL(source || model) per held-out token in nats, before tuning.
        divergence: The same with `weight`.
    """

    weight: torch.Tensor
    error_before: float
    error: float
    divergence_before: float
    divergence: float


def tune_final_norm(
    source: LayerWalk,
    walk: LayerWalk,
    original: torch.Tensor,
    states: torch.Tensor,
    samples: Samples,
    dtype: torch.dtype,
    seed: int,
) -> TunedNorm:
    """Tunes the weight of a model's final norm.

    Args:
        source: The walk over the original model.
        walk: A walk over a checkpoint with the model's final norm and head.
        original: Last hidden states of the original, shape (samples, length, hidden_size).
        states: Last hidden states of the model, of the same shape.
        samples: The samples, some of them held out.
        dtype: Type of the saved weight.
        seed: Seed of the order of the samples.
    """
    arch = walk.checkpoint.arch
    weight = walk.checkpoint.read([arch.final_norm_weight])[arch.final_norm_weight].double()
    whole = weight + arch.norm_offset

    def saved(factors: torch.Tensor) -> torch.Tensor:
        return (whole * factors.double().cpu() - arch.norm_offset).to(dtype)

    def effect(stored: torch.Tensor) -> torch.Tensor:
        ratio = torch.where(whole != 0, (stored.double() + arch.norm_offset) / whole, 1.0)
        return ratio.float().to(walk.device)

    with source.head() as source_logits, walk.head() as own_logits:
        learner = _Learner(source, walk, source_logits, own_logits, original, states)
        length = max(1, samples.tokens.shape[1])
        held = range(samples.num_train, len(samples.tokens))[: _share(_HELD_OUT, length, walk)]
        plain = saved(torch.ones_like(weight))
        before = learner.divergence(held, effect(plain))
        factors = learner.learn(min(samples.num_train, _share(LEARNED, length, walk)), length, seed)
        stored = walk.ranks.broadcast_tensor(saved(factors).to(walk.device)).cpu()
        after = learner.divergence(held, effect(stored))
    error_before = norm_error(source, walk, original, states, samples, effect(plain))
    if walk.ranks.broadcast(not after < before):
        return TunedNorm(plain, error_before, error_before, before, before)
    error = norm_error(source, walk, original, states, samples, effect(stored))
    return TunedNorm(stored, error_before, error, before, after)


def _share(tokens: int, length: int, walk: LayerWalk) -> int:
    """The samples of one process that have so many tokens in all."""
    return max(1, tokens // (length * walk.ranks.size))


@dataclass(frozen=True)
class _Learner:
    """The heads of both models, and their last hidden states."""

    source: LayerWalk
    walk: LayerWalk
    source_logits: Logits
    own_logits: Logits
    original: torch.Tensor
    states: torch.Tensor

    def learn(self, count: int, length: int, seed: int) -> torch.Tensor:
        """The factors, learned from the first `count` samples; shape (hidden_size,)."""
        walk = self.walk
        logs = torch.zeros(self.states.shape[-1], device=walk.device).requires_grad_()
        optimizer = torch.optim.Adam([logs], _LEARNING_RATE)
        size = max(1, min(count, _STEP // (length * walk.ranks.size)))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, _STEPS))
        for _, chosen in zip(range(_STEPS), shuffled(count, size, seed), strict=False):
            tokens = max(1, len(chosen) * length)  # a process may have none
            for divergence in self._divergences(chosen, logs):
                (divergence.sum() / tokens).backward()  # type: ignore[no-untyped-call]
            assert logs.grad is not None
            walk.ranks.average(len(chosen), logs.grad)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        return logs.detach().exp()

    @torch.no_grad()
    def divergence(self, rows: range, factors: torch.Tensor) -> float:
        """The mean of KL(source || model) over the tokens of some samples of all processes."""
        total, count = 0.0, 0
        for row in rows:
            for divergence in self._divergences(torch.tensor([row]), factors.log()):
                total, count = total + float(divergence.double().sum()), count + divergence.numel()
        return self.walk.ranks.mean(total / max(1, count), count)

    def _divergences(self, rows: torch.Tensor, logs: torch.Tensor) -> Iterator[torch.Tensor]:
        """KL(source || model) of every token of some samples, some tokens at a time."""
        walk, piece = self.walk, max(1, LOGITS // self.walk.checkpoint.sizes.vocabulary)
        fast = walk.ranks.has_fast_bfloat16(walk.device)
        pair = (walk.to_device(x[rows]).flatten(0, 1) for x in (self.original, self.states))
        for target, own in zip(*(torch.split(x, piece) for x in pair), strict=True):
            with torch.autocast(walk.device.type, torch.bfloat16, enabled=fast):
                with torch.no_grad():
                    wanted = self.source_logits(target[None]).float().log_softmax(-1)
                told = self.own_logits(own[None], logs.exp()).float().log_softmax(-1)
            yield (wanted.exp() * (wanted - told)).sum(-1)
