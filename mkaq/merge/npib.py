"""NPIB: normalized mutual information between two layers (MKA section 3.2, eq. 8)."""

from typing import Literal

import numpy as np
import numpy.typing as npt

Correction = Literal["miller_madow", "none"]
Labels = npt.NDArray[np.int64]


def equal_frequency_cells(points: npt.NDArray[np.floating], bins: int) -> Labels:
    """The cell of every point, with each coordinate cut at its quantiles into `bins` bins.

    Ranks are cut, not values, so the bins are equally full; ties are broken by position.

    Args:
        points: Shape (n, dimensions).
        bins: Bins per coordinate.

    Returns:
        Cell numbers in [0, bins**dimensions), shape (n,).
    """
    count, dimensions = points.shape
    cells: Labels = np.zeros(count, dtype=np.int64)
    for axis in range(dimensions):
        rank = np.empty(count, dtype=np.int64)
        rank[np.argsort(points[:, axis], kind="stable")] = np.arange(count)
        cells = cells * bins + rank * bins // count
    return cells


def entropy(cells: Labels, correction: Correction = "miller_madow") -> float:
    """Plug-in entropy in nats, with the Miller-Madow correction (occupied cells - 1) / (2 n)."""
    counts = np.unique(cells, return_counts=True)[1]
    p = counts / len(cells)
    plug_in = float(-(p * np.log(p)).sum())
    return plug_in + ((len(counts) - 1) / (2 * len(cells)) if correction == "miller_madow" else 0.0)


def npib(first: Labels, second: Labels, correction: Correction = "miller_madow") -> float:
    """I(X; Y) / sqrt(H(X) H(Y)) of two labellings of the same points.

    Returns:
        A value in [0, 1], symmetric: 1 for equal labellings, about 0 for independent ones.
    """
    h_first, h_second = entropy(first, correction), entropy(second, correction)
    if h_first <= 0 or h_second <= 0:
        return 1.0 if np.array_equal(first, second) else 0.0
    joint = entropy(first * (int(second.max()) + 1) + second, correction)
    return float(np.clip((h_first + h_second - joint) / np.sqrt(h_first * h_second), 0.0, 1.0))


def similarity_matrix(
    cells: list[Labels], correction: Correction = "miller_madow"
) -> npt.NDArray[np.float64]:
    """NPIB of every pair of layers, shape (layers, layers), symmetric with a unit diagonal."""
    count = len(cells)
    matrix = np.eye(count)
    for i in range(count):
        for j in range(i):
            matrix[i, j] = matrix[j, i] = npib(cells[i], cells[j], correction)
    return matrix
