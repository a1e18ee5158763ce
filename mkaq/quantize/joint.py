"""The joint target: weights are solved toward the original model before they are rounded.

The linear layers that write to the residual stream (`o_proj`, `down_proj`) are solved in closed form, on the
output of the merged and already quantized layers before them, so that it returns to the source's hidden
states. GPTQ then rounds the solved weights, and at the end the final norm is rescaled. For tokens X, target R
and W* = argmin |R - X W^T|^2, |R - X Q^T|^2 = |R - X W*^T|^2 + |X (W* - Q)^T|^2: rounding W* is rounding
toward the source.
"""

from collections.abc import Sequence

import torch
from torch import nn

from mkaq.arch.parts import attention_parts, mlp_parts
from mkaq.fit.final_norm import Rescaled, rescale
from mkaq.fit.hold_out import Samples
from mkaq.fit.ridge import Fit
from mkaq.fit.targets import add_rows, add_up, advance, fit_together, moments_of
from mkaq.walk.piecewise import Piecewise
from mkaq.walk.walk import LayerWalk

NEARLY_BEST = 0.95  # the fraction of the best gain to keep; a smaller one corrects less of the rounding


class JointTarget:
    """The original model's hidden states, walked side by side with the model to quantize.

    Args:
        source: The walk over the original model.
        groups: For each layer of the model to quantize, the original layers that it replaces.
        samples: The calibration samples.

    Attributes:
        source: As given.
    """

    def __init__(self, source: LayerWalk, groups: Sequence[Sequence[int]], samples: Samples) -> None:
        self.source, self._groups, self._samples = source, groups, samples
        self._original = source.embed(samples.tokens)
        self._attended = source.activations.empty(tuple(self._original.shape), torch.float32)
        checkpoint = source.checkpoint
        self._heads = attention_parts(checkpoint.arch, checkpoint.sizes)
        self._channels = mlp_parts(checkpoint.arch, checkpoint.sizes)

    def enter(self, index: int, states: torch.Tensor) -> None:
        """Moves the original stream past the layers that layer `index` replaces.

        Args:
            index: The layer of the model to quantize.
            states: Its input, shape (samples, length, hidden_size).
        """
        group, writer = self._groups[index], self._heads.writer
        advance(self.source, group, writer, self._original, states, self._attended)

    @torch.no_grad()
    def solve(self, pieces: Piecewise, layer: nn.Module, name: str) -> Fit | None:
        """The best weight of a linear layer toward the source; None if it writes no hidden state.

        Args:
            pieces: The layer's pieces, quantized so far.
            layer: The layer.
            name: The linear layer.
        """
        parts = {kind.writer: kind for kind in (self._heads, self._channels)}.get(name)
        if parts is None:
            return None
        linear = layer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        width = linear.in_features
        moments = moments_of(self.source, width), moments_of(self.source, width)
        for split, batches in zip(moments, self._samples.halves(), strict=True):
            for rows in batches:
                inputs, final = pieces.input_of(name, rows), self.source.fetch(self._original[rows])
                if parts is self._heads:
                    target = self.source.fetch(self._attended[rows])
                else:
                    target = final.float() - pieces.input_of(parts.norm, rows)
                if linear.bias is not None:
                    target = target - linear.bias
                add_rows(split, inputs, target, final)
        add_up(self.source.ranks, *moments)
        return fit_together(self.source.ranks, *moments, linear.weight, NEARLY_BEST)

    def rescale(self, walk: LayerWalk, states: torch.Tensor) -> Rescaled:
        """The factor of the final norm, once all layers are quantized.

        Args:
            walk: The walk over the quantized model.
            states: The output of its last layer.
        """
        return rescale(self.source, walk, self._original, states, self._samples)
