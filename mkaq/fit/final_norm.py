"""The final norm, rescaled: a model that knows less must not be as sure.

What least squares cannot foresee it leaves out, so the last hidden state of a fused or tuned model is
shorter than the original's in just the directions that were lost. The final norm divides by the length,
which undoes that: the logits become as large as the original's with less behind them. One factor on its
weight, the least squares solution toward the original's normed states, puts them right.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from mkaq.checkpoint.reader import Checkpoint
from mkaq.fit.hold_out import Samples
from mkaq.walk.walk import LayerWalk


@dataclass(frozen=True)
class Rescaled:
    """The factor of the final norm; errors are shares of the target's energy, held-out tokens.

    Attributes:
        scale: To four decimals; 1 if no other is better on the held-out tokens.
        error_before: With factor 1.
        error: With `scale`.
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
    """The factor with which the compressed model's final norm comes closest to the original's.

    Args:
        source: Over the original model.
        walk: Over a checkpoint with the compressed model's final norm.
        original: Last hidden states of the source, shape (samples, length, hidden_size).
        compressed: Those of the compressed model, of the same shape.
        samples: Which ones are held out.
    """
    learned, held = _energies(source, walk, original, compressed, samples)
    if not (learned.found > 0 and held.target > 0):
        return Rescaled(1.0, 0.0, 0.0)
    scale = round(learned.product / learned.found, 4)
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
    """The share of the energy of the original's normed states that a model's final norm, as it is, misses on
    held-out tokens; arguments as for `rescale`.
    """
    return _energies(source, walk, original, compressed, samples)[1].missed(1.0)


class _Energies(NamedTuple):
    """Sums over tokens: |t|^2, t f and |f|^2, t what the original's norm gives and f the other one."""

    target: float
    product: float
    found: float

    def missed(self, factor: float) -> float:
        """sum |t - factor f|^2 / sum |t|^2."""
        if not self.target > 0:
            return 0.0
        return max(0.0, 1 - (2 * factor * self.product - factor**2 * self.found) / self.target)


def _energies(
    source: LayerWalk,
    walk: LayerWalk,
    original: torch.Tensor,
    compressed: torch.Tensor,
    samples: Samples,
) -> tuple[_Energies, _Energies]:
    """Of the tokens to learn from, and of those that are held out, of all processes."""
    sums = torch.zeros(2, 3, dtype=torch.float64, device=walk.device)
    with source.final_norm() as theirs, walk.final_norm() as own:
        for half, parts in zip(sums, samples.halves(), strict=True):
            for rows in parts:
                target = theirs(walk.fetch(original[rows])).float()
                found = own(walk.fetch(compressed[rows])).float()
                for number, (a, b) in enumerate(((target, target), (target, found), (found, found))):
                    half[number] += (a * b).sum(-1).double().sum()
                walk.activations.release()
    walk.ranks.add(sums)
    learned, held = walk.ranks.tell(sums.tolist())
    return _Energies(*learned), _Energies(*held)


def rescaled(checkpoint: Checkpoint, found: Rescaled | None, dtype: torch.dtype) -> torch.Tensor:
    """The weight of a checkpoint's final norm, rescaled as was found, if anything was."""
    name = checkpoint.arch.final_norm_weight
    weight = checkpoint.read([name])[name]
    return scaled_norm(weight, found.scale if found else 1.0, checkpoint.arch.norm_offset, dtype)


def scaled_norm(weight: torch.Tensor, scale: float, offset: float, dtype: torch.dtype) -> torch.Tensor:
    """The weight of a norm that gives `scale` times as much.

    Args:
        weight: Of a norm that multiplies by offset + weight.
        scale: The factor.
        offset: 0, or 1 in families whose norms are written so.
        dtype: Of the result; the product is taken in float64.
    """
    if scale == 1:
        return weight.to(dtype)
    return ((weight.double() + offset) * scale - offset).to(dtype)
