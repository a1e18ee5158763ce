"""Rescales the final norm: a model that knows less must not be as confident.

Least squares leaves out what it cannot predict, so the last hidden state of a fused or tuned model is shorter
than the original's, in just the directions that were lost. The final norm divides by the length and undoes
this: the logits become as large as the original's, with less behind them. The correction is one factor on the
norm's weight, scale = (sum t f) / (sum |f|^2), the least squares solution from the compressed model's normed
states f toward the original's t.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from mkaq.checkpoint.reader import Checkpoint
from mkaq.fit.hold_out import Samples
from mkaq.walk.walk import LayerWalk


@dataclass(frozen=True)
class Rescaled:
    """The factor of the final norm. Errors are fractions of the target's energy on held-out tokens.

    Attributes:
        scale: The factor, to four decimals; 1 if no other is better on the held-out tokens.
        error_before: The error with factor 1.
        error: The error with `scale`.
    """

    scale: float
    error_before: float
    error: float


@torch.no_grad()
def rescale(
    source: LayerWalk,
    walk: LayerWalk,
    original: torch.Tensor,
    compressed: torch.Tensor,
    samples: Samples,
) -> Rescaled:
    """The factor that brings the compressed model's normed states closest to the original's.

    Args:
        source: The walk over the original model.
        walk: A walk over a checkpoint with the compressed model's final norm.
        original: Last hidden states of the original, shape (samples, length, hidden_size).
        compressed: Last hidden states of the compressed model, of the same shape.
        samples: The samples, some of them held out.
    """
    learned, held = _energies(source, walk, original, compressed, samples)
    if not (learned.own > 0 and held.target > 0):
        return Rescaled(1.0, 0.0, 0.0)
    scale = round(learned.product / learned.own, 4)
    if scale <= 0 or held.missed(scale) >= held.missed(1.0):
        scale = 1.0
    return Rescaled(scale, held.missed(1.0), held.missed(scale))


@torch.no_grad()
def norm_error(
    source: LayerWalk,
    walk: LayerWalk,
    original: torch.Tensor,
    compressed: torch.Tensor,
    samples: Samples,
) -> float:
    """The error of a model's final norm as it is: sum |t - f|^2 / sum |t|^2 over held-out tokens.

    The arguments are those of `rescale`; t are the original's normed states, f the model's.
    """
    return _energies(source, walk, original, compressed, samples)[1].missed(1.0)


class _Energies(NamedTuple):
    """Sums over tokens: |t|^2, t f and |f|^2; t is the output of the original's norm, f of the other one."""

    target: float
    product: float
    own: float

    def missed(self, factor: float) -> float:
        """sum |t - factor f|^2 / sum |t|^2."""
        if not self.target > 0:
            return 0.0
        return max(0.0, 1 - (2 * factor * self.product - factor**2 * self.own) / self.target)


def _energies(
    source: LayerWalk,
    walk: LayerWalk,
    original: torch.Tensor,
    compressed: torch.Tensor,
    samples: Samples,
) -> tuple[_Energies, _Energies]:
    """The sums over the tokens to learn from and over the held-out tokens, of all processes."""
    sums = torch.zeros(2, 3, dtype=torch.float64, device=walk.device)
    with source.final_norm() as source_norm, walk.final_norm() as own_norm:
        for split, batches in zip(sums, samples.splits(), strict=True):
            for rows in batches:
                target = source_norm(walk.to_device(original[rows])).float()
                own = own_norm(walk.to_device(compressed[rows])).float()
                for number, (a, b) in enumerate(((target, target), (target, own), (own, own))):
                    split[number] += (a * b).sum(-1).double().sum()
                walk.activations.release()
    walk.ranks.all_reduce(sums)
    learned, held = walk.ranks.broadcast(sums.tolist())
    return _Energies(*learned), _Energies(*held)


def rescaled(checkpoint: Checkpoint, rescaling: Rescaled | None, dtype: torch.dtype) -> torch.Tensor:
    """The weight of a checkpoint's final norm, rescaled if there is a factor for it."""
    name = checkpoint.arch.final_norm_weight
    weight = checkpoint.read([name])[name]
    return scaled_norm(weight, rescaling.scale if rescaling else 1.0, checkpoint.arch.norm_offset, dtype)


def scaled_norm(weight: torch.Tensor, scale: float, offset: float, dtype: torch.dtype) -> torch.Tensor:
    """The weight with which a norm's output is `scale` times as large.

    Args:
        weight: The weight of a norm that multiplies by offset + weight.
        scale: The factor.
        offset: 0, or 1 in some families.
        dtype: The dtype of the result; the product is taken in float64.
    """
    if scale == 1:
        return weight.to(dtype)
    return ((weight.double() + offset) * scale - offset).to(dtype)
