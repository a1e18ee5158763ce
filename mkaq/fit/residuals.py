"""How far a model's hidden states are from the original's, layer by layer: the same for run and verify."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mkaq.fit.final_norm import norm_error
from mkaq.fit.hold_out import Samples, held_out_error
from mkaq.walk.walk import LayerWalk


@dataclass(frozen=True)
class Residuals:
    """Errors of a model's own weights, on held-out tokens.

    Attributes:
        layers: After each layer the mean of |output - original|^2 / |original|^2.
        final_norm: The share of the energy of the original's normed states that is missed, by the final
            norm as it is.
    """

    layers: list[float]
    final_norm: float


@torch.no_grad()
def residuals(
    source: LayerWalk, walk: LayerWalk, groups: Sequence[Sequence[int]], samples: Samples
) -> Residuals:
    """Walks the original and the model made of it side by side.

    Args:
        source: Over the original.
        walk: Over the model.
        groups: For each of its layers the layers of the original that it stands for.
        samples: Held-out ones.
    """
    original, states = source.embed(samples.tokens), walk.embed(samples.tokens)
    errors = []
    for new, group in enumerate(groups):
        for index in group:
            source.pass_layer(index, original)
        walk.pass_layer(new, states)
        errors.append(held_out_error(walk, samples, states, original))
    return Residuals(errors, norm_error(source, walk, original, states, samples))
