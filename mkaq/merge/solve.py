"""The parts of a fused layer: selecting heads and channels, and solving the weight that writes them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from mkaq.arch.parts import Parts
from mkaq.fit.hold_out import Samples, token_weights
from mkaq.fit.moments import Moments
from mkaq.fit.ridge import Outcome
from mkaq.fit.select import column_sizes, columns_of, keep_columns
from mkaq.fit.targets import add_rows, add_up, fit_together, moments_of
from mkaq.merge.parts import all_parts, take_columns, take_parts
from mkaq.ranks import Ranks
from mkaq.walk.batches import TOKENS_PER_BATCH
from mkaq.walk.walk import LayerWalk

CANDIDATES = 1.5  # candidate channels per kept channel: those that write most
SELECTION_RIDGE = 1e-2
NEARLY_BEST = 0.9  # fraction of the best ridge's gain on held-out text of the calibration's domain

Features = Callable[[slice], torch.Tensor]
"""What parts give to the writer for some samples, side by side, shape (samples, length, columns)."""


@dataclass(frozen=True)
class Candidates:
    """One kind of part in all layers of a group.

    Attributes:
        parts: Heads or channels.
        readers: The readers of each layer, rewritten to follow the first layer's norm.
        features_of: The features of parts, given their origins (position in the group, number).
    """

    parts: Parts
    readers: Sequence[Mapping[str, torch.Tensor]]
    features_of: Callable[[torch.Tensor], Features]


@dataclass(frozen=True)
class PartSolver:
    """Selects heads and channels and solves the weight that writes them.

    Attributes:
        walk: A walk over the source.
        first: The first layer of the group.
        original: The source's hidden states after the group, shape (samples, length, hidden_size).
        samples: The samples of the stream.
        layers: The tensors of each layer of the group, by name below the layer.
        dtype: Type of the new tensors.
    """

    walk: LayerWalk
    first: int
    original: torch.Tensor
    samples: Samples
    layers: Sequence[Mapping[str, torch.Tensor]]
    dtype: torch.dtype

    def solve(
        self,
        candidates: Candidates,
        target_at: Callable[[slice], torch.Tensor],
        new: dict[str, torch.Tensor],
    ) -> tuple[torch.Tensor, Outcome]:
        """Adds the readers and the solved writer of one kind of part to a new layer.

        Args:
            candidates: The parts to choose from.
            target_at: What they should write, for some samples.
            new: The new layer's tensors.

        Returns:
            Old layer and number of each part, shape (count, 2), int32; and how well the writer was solved.
        """
        ranks, (learned, held) = self.walk.ranks, self.samples.splits()
        parts, features_of = candidates.parts, candidates.features_of
        origins = all_parts(len(self.layers), parts)
        if parts.width == 1 and len(self.layers) > 1:
            origins = origins[self._strongest(candidates, origins)]
        moments = self._moments(features_of(origins), target_at, len(origins) * parts.width, learned)
        if len(self.layers) > 1:
            chosen = choose_together(ranks, moments, parts)
            origins = origins[chosen.cpu()]
            moments = moments.select(columns_of(chosen, parts.width))
        held_out = self._moments(features_of(origins), target_at, len(origins) * parts.width, held)
        prior = take_columns(self.layers, parts, origins).to(self.walk.device)
        solved = fit_together(ranks, moments, held_out, prior, NEARLY_BEST)
        new.update(take_parts(candidates.readers, parts, origins))
        rounded = solved.weight.to(self.dtype)
        new[f"{parts.out_proj}.weight"] = rounded.cpu()
        origins[:, 0] += self.first
        error = solved.error if solved.ridge is None else ranks.broadcast(held_out.error(rounded))
        return origins.to(torch.int32), Outcome(solved.ridge, solved.error_before, error)

    def _strongest(self, candidates: Candidates, origins: torch.Tensor) -> torch.Tensor:
        """The parts that write most by themselves, measured on the first batch of all samples."""
        rows, ranks, parts = first_batch(self.samples), self.walk.ranks, candidates.parts
        sizes = torch.zeros(len(origins), device=self.walk.device)
        if len(self.original[rows]):  # else the batch belongs to other processes
            weights = token_weights(self.walk.to_device(self.original[rows])).reshape(-1)
            per_layer = (torch.split(numbers, parts.count) for numbers in (sizes, origins))
            for size, own, layer in zip(*per_layer, self.layers, strict=True):  # one layer's parts at a time
                features = candidates.features_of(own)(rows).flatten(0, -2)
                size += column_sizes(features, weights, layer[f"{parts.out_proj}.weight"])
        ranks.all_reduce(sizes)
        strong = sizes.topk(int(CANDIDATES * parts.count)).indices.sort().values
        return ranks.broadcast_tensor(strong).cpu()

    def _moments(
        self,
        features_at: Features,
        target_at: Callable[[slice], torch.Tensor],
        columns: int,
        batches: Sequence[slice],
    ) -> Moments:
        moments = moments_of(self.walk, columns)
        for rows in batches:
            final = self.walk.to_device(self.original[rows])
            add_rows(moments, features_at(rows), target_at(rows), final)
            self.walk.activations.release()
        add_up(self.walk.ranks, moments)
        return moments


def first_batch(samples: Samples) -> slice:
    """This process's part of the first batch; the batch is the same for any number of processes."""
    size = max(1, TOKENS_PER_BATCH // samples.tokens.shape[1])
    return slice(0, min(max(0, size - samples.first), samples.num_train))


def choose_together(ranks: Ranks, moments: Moments, parts: Parts) -> torch.Tensor:
    """The parts to keep, shape (count,), chosen by the first process."""
    if ranks.is_main:
        return ranks.broadcast_tensor(keep_columns(moments, parts.count, SELECTION_RIDGE, parts.width))
    device = moments.cross.device
    return ranks.broadcast_tensor(torch.empty(parts.count, dtype=torch.int64, device=device))
