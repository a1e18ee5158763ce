"""The layers of a fused model, each solved on the outputs of the layers before it."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mkaq.checkpoint.finished import Finished
from mkaq.checkpoint.output import cast
from mkaq.digests import digest_of
from mkaq.fit.final_norm import Rescaled, rescale
from mkaq.fit.hold_out import Samples
from mkaq.fit.ridge import Outcome
from mkaq.merge.channels import FusedLayer, fuse, pass_attention, pass_fused
from mkaq.merge.origins import origins_of, shares
from mkaq.merge.write import NewLayer
from mkaq.walk.walk import LayerWalk

_HEADS, _CHANNELS = "heads", "channels"  # origins, beside the tensors of a layer


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


def fused_layers(
    streams: Streams, groups: Sequence[Sequence[int]], dtype: torch.dtype, finished: Finished
) -> Iterator[NewLayer]:
    """Yields the fused layers in order; advances the streams.

    Args:
        streams: Hidden states before the first layer.
        groups: The old layers of each new one.
        dtype: Type of the new tensors.
        finished: Layers fused before this was stopped; gets those that are fused.
    """
    walk, original, compressed = streams.walk, streams.original, streams.compressed
    for new, group in enumerate(groups):
        if found := finished.find(new):
            layer = _restored(group, *found)
            for index in group:
                walk.pass_layer(index, original)
            pass_attention(walk, group[0], layer.tensors, compressed)
        else:
            layer = fuse(walk, group, original, compressed, streams.samples, dtype)
            parts = {_HEADS: layer.heads, _CHANNELS: layer.channels}
            finished.keep(new, layer.tensors | parts, _outcomes(layer))
        pieces = {name: [cast(tensor, dtype, name)] for name, tensor in layer.tensors.items()}
        origins = origins_of(layer)
        record = {
            "origins_sha256": digest_of(origins),
            **_outcomes(layer),
            "residual": pass_fused(walk, layer, original, compressed, streams.samples),
        }
        fractions = {str(old): fraction for old, fraction in shares(layer).items()}
        yield NewLayer(pieces, {"from": fractions, "fused": record}, origins)


def _outcomes(layer: FusedLayer) -> dict[str, Any]:
    """How well its writers were solved, as plain data."""
    return {"attention": asdict(layer.attention), "mlp": asdict(layer.mlp)}


def _restored(group: Sequence[int], tensors: dict[str, torch.Tensor], outcomes: Any) -> FusedLayer:
    """A layer as it was kept."""
    heads, channels = tensors.pop(_HEADS), tensors.pop(_CHANNELS)
    solved = {part: Outcome(**outcome) for part, outcome in outcomes.items()}
    return FusedLayer(tuple(group), tensors, heads, channels, **solved)
