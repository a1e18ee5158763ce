"""The similarity of a model's layers, computed in one walk."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from mkaq.errors import UsageError
from mkaq.merge.manifold import diffusion_map
from mkaq.merge.npib import Correction, equal_frequency_cells, similarity_matrix
from mkaq.progress import Progress
from mkaq.walk.walk import LayerWalk


@dataclass(frozen=True)
class LayerSimilarity:
    """The similarity of a model's layers.

    Attributes:
        matrix: NPIB of every pair of layers, shape (layers, layers).
        coordinates: Diffusion coordinates, shape (layers, points, dimensions).
    """

    matrix: npt.NDArray[np.float64]
    coordinates: npt.NDArray[np.float64]


def compare_layers(
    walk: LayerWalk,
    tokens: torch.Tensor,
    seed: int,
    progress: Progress,
    *,
    dimensions: int = 2,
    points: int = 1024,
    bandwidth: float | Literal["median"] = "median",
    alpha: float = 0.5,
    time: float = 1.0,
    bins: int = 4,
    bias_correction: Correction = "miller_madow",
) -> LayerSimilarity:
    """Diffusion maps of every layer's output at the same token positions, and their NPIB.

    Args:
        walk: A walk over the model.
        tokens: Calibration token ids of all processes, shape (samples, length).
        seed: Seed of the choice of token positions.
        progress: Reports every layer.
        dimensions: Number of diffusion coordinates.
        points: Largest number of token positions.
        bandwidth: Width of the kernel: a number, or the median distance.
        alpha: Exponent of the density normalization.
        time: Diffusion time.
        bins: Bins per coordinate.
        bias_correction: Correction of the entropies.

    Raises:
        UsageError: If a layer has no diffusion map.
    """
    length = tokens.shape[1]
    inner = np.flatnonzero(np.arange(tokens.numel()) % length)  # first tokens are outliers
    count = min(points, len(inner))
    chosen = np.sort(np.random.default_rng(seed).choice(inner, count, replace=False))
    own = chosen[walk.ranks.share(count)]
    samples = np.unique(own // length)
    rows = torch.from_numpy(np.searchsorted(samples, own // length) * length + own % length)
    width = None if bandwidth == "median" else float(bandwidth)
    maps = []
    walked = walk.hidden_states(tokens[torch.from_numpy(samples)])
    for index, hidden_states in progress.track(walked, "compare layers", walk.num_layers):
        states = walk.fetch(hidden_states.reshape(-1, hidden_states.shape[-1])[rows.to(hidden_states.device)])
        sampled = walk.ranks.join(states.float(), count).cpu().numpy()
        try:
            maps.append(diffusion_map(sampled, dimensions, width, alpha, time))
        except ValueError as error:
            fix = "more calibration text, or another bandwidth"
            raise UsageError(
                f"layer {index} has no diffusion map: {error}", where="merge.manifold", fix=fix
            ) from None
    cells = [equal_frequency_cells(coordinates, bins) for coordinates in maps]
    matrix = similarity_matrix(cells, bias_correction)
    matrix = walk.ranks.from_first(torch.from_numpy(matrix).to(walk.device)).cpu().numpy()
    return LayerSimilarity(matrix, np.stack(maps))
