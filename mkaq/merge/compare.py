"""How alike the layers of a model are, in one walk."""

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
    """How alike the layers of a model are.

    Attributes:
        matrix: NPIB of every pair, shape (layers, layers).
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
        walk: The model.
        tokens: Calibration token ids, shape (samples, length), for every process all.
        seed: Chooses the token positions.
        progress: Told of every layer.
        dimensions: Diffusion coordinates kept.
        points: Token positions, at most.
        bandwidth: Of the kernel; the median distance, or a number.
        alpha: Density normalization.
        time: Diffusion time.
        bins: Per coordinate.
        bias_correction: Of entropies.

    Raises:
        UsageError: If a layer has no diffusion map.
    """
    length = tokens.shape[1]
    inner = np.flatnonzero(np.arange(tokens.numel()) % length)  # first tokens are unlike all others
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
        found = walk.ranks.join(states.float(), count).cpu().numpy()
        try:
            maps.append(diffusion_map(found, dimensions, width, alpha, time))
        except ValueError as error:
            fix = "more calibration text, or another bandwidth"
            raise UsageError(
                f"layer {index} has no diffusion map: {error}", where="merge.manifold", fix=fix
            ) from None
    cells = [equal_frequency_cells(coordinates, bins) for coordinates in maps]
    matrix = similarity_matrix(cells, bias_correction)
    matrix = walk.ranks.from_first(torch.from_numpy(matrix).to(walk.device)).cpu().numpy()
    return LayerSimilarity(matrix, np.stack(maps))
