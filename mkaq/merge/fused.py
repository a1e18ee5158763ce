"""The layers of a fused model, each solved on the outputs of the layers before it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mkaq.checkpoint.output import cast
from mkaq.digests import digest_of
from mkaq.fit.final_norm import Rescaled, rescale
from mkaq.fit.hold_out import Samples
from mkaq.fit.ridge import Fit
from mkaq.merge.channels import fuse, pass_fused
from mkaq.merge.origins import origins_of, shares
from mkaq.merge.write import NewLayer
from mkaq.walk.walk import LayerWalk


@dataclass(frozen=True)
class Streams:
    """Hidden states of the source and of the fused model for the same tokens, at the same depth.

    Attributes:
        walk: A walk over the source.
        original: The source's hidden states, shape (samples, length, hidden_size).
        compressed: The fused model's hidden states, of the same shape.
        samples: Their samples.
    """

    walk: LayerWalk
    original: torch.Tensor
    compressed: torch.Tensor
    samples: Samples

    @classmethod
    def of(cls, walk: LayerWalk, samples: Samples) -> "Streams":
        """Both streams before the first layer."""
        embedded = walk.embed(samples.tokens)
        return cls(walk, embedded, walk.activations.copy(embedded), samples)

    def rescale(self) -> Rescaled:
        """The factor of the fused model's final norm; both streams must be past the last layer."""
        return rescale(self.walk, self.walk, self.original, self.compressed, self.samples)


def fused_layers(streams: Streams, groups: Sequence[Sequence[int]], dtype: torch.dtype) -> Iterator[NewLayer]:
    """Yields the fused layers in order; advances the streams."""
    walk, original, compressed = streams.walk, streams.original, streams.compressed
    for group in groups:
        layer = fuse(walk, group, original, compressed, streams.samples, dtype)
        pieces = {name: [cast(tensor, dtype, name)] for name, tensor in layer.tensors.items()}
        origins = origins_of(layer)
        record = {
            "origins_sha256": digest_of(origins),
            "attention": _solved(layer.attention),
            "mlp": _solved(layer.mlp),
            "residual": pass_fused(walk, layer, original, compressed, streams.samples),
        }
        fractions = {str(old): fraction for old, fraction in shares(layer).items()}
        yield NewLayer(pieces, {"from": fractions, "fused": record}, origins)


def _solved(fit: Fit) -> dict[str, float | None]:
    return {"ridge": fit.ridge, "error_before": fit.error_before, "error": fit.error}
