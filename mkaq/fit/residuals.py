"""Residuals between the hidden states of a model and of the original, for runs and for verification."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mkaq.fit.final_norm import norm_error
from mkaq.fit.hold_out import Samples, held_out_error
from mkaq.walk.walk import LayerWalk


@dataclass(frozen=True)
class Residuals:
    """Errors of a model with its own weights, on held-out tokens.

    Attributes:
        layers: After each layer the mean of |output - original|^2 / |original|^2.
        final_norm: sum |t - f|^2 / sum |t|^2, t the normed states of the original and f those of the model.
    """

    layers: list[float]
    final_norm: float


@torch.no_grad()
def residuals(
    source: LayerWalk, walk: LayerWalk, groups: Sequence[Sequence[int]], samples: Samples
) -> Residuals:
    """Walks the original and a model made from it side by side.

    Args:
        source: The walk over the original.
        walk: The walk over the model.
        groups: For each layer of the model, the layers of the original that it replaces.
        samples: Held-out samples.
    """
    original, states = source.embed(samples.tokens), walk.embed(samples.tokens)
    errors = []
    for new, group in enumerate(groups):
        for index in group:
            source.pass_layer(index, original)
        walk.pass_layer(new, states)
        errors.append(held_out_error(walk, samples, states, original))
    return Residuals(errors, norm_error(source, walk, original, states, samples))
