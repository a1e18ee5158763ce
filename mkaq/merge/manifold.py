"""Diffusion maps: the shape of a layer's hidden states in a few coordinates (MKA section 3.1)."""

import numpy as np
import numpy.typing as npt
from scipy.linalg import eigh
from scipy.spatial.distance import pdist, squareform
from threadpoolctl import threadpool_limits

Array = npt.NDArray[np.float64]


def diffusion_map(
    states: npt.NDArray[np.floating],
    dimensions: int = 2,
    bandwidth: float | None = None,
    alpha: float = 0.5,
    time: float = 1.0,
) -> Array:
    """Diffusion coordinates of points (Coifman and Lafon 2006, Diffusion maps, eq. 2.2 and 3.1).

    The Gaussian kernel exp(-d^2 / (2 s^2)) is normalized by its density to the power alpha, made
    a Markov matrix, and its leading non-trivial right eigenvectors are scaled by their
    eigenvalues to the power `time`. The sign of a coordinate is fixed by its largest entry.
    Eigenvectors of eigenvalue 1 are trivial too: they only say which points are cut off from the
    rest, as the states of a first token often are.

    Args:
        states: Points, shape (n, features).
        dimensions: Coordinates to return.
        bandwidth: s; the median pairwise distance if None.
        alpha: Density normalization in [0, 1].
        time: Diffusion time.

    Returns:
        Shape (n, dimensions).

    Raises:
        ValueError: If there are too few points, all are the same, or all are cut off from one another.
    """
    count = len(states)
    if count < dimensions + 2:
        raise ValueError(f"{count} points are too few for {dimensions} diffusion coordinates")
    distances = pdist(np.asarray(states, dtype=np.float64))
    width = float(np.median(distances)) if bandwidth is None else bandwidth
    if not width > 0:
        raise ValueError("more than half of the points are the same: no bandwidth")
    kernel = np.exp(-(squareform(distances) ** 2) / (2 * width**2))
    density = kernel.sum(axis=1)
    kernel /= np.outer(density, density) ** alpha
    root = np.sqrt(kernel.sum(axis=1))
    kernel /= np.outer(root, root)
    values, vectors = _leading(kernel, dimensions)
    trivial = root / np.linalg.norm(root)  # the leading eigenvector, known in closed form
    coordinates = vectors / trivial[:, None] * np.maximum(values, 0) ** time
    largest = np.abs(coordinates).argmax(axis=0)
    result: Array = coordinates * np.where(coordinates[largest, np.arange(dimensions)] < 0, -1.0, 1.0)
    return result


def _leading(kernel: Array, dimensions: int) -> tuple[Array, Array]:
    """The largest eigenvalues below 1, falling, and their eigenvectors as columns."""
    count = len(kernel)
    wanted = dimensions + 1
    while wanted < count:
        wanted = min(wanted + 8, count)
        with threadpool_limits(1):  # small: threads only get in each other's way on a busy machine
            values, vectors = eigh(kernel, subset_by_index=[count - wanted, count - 1])
        telling = np.flatnonzero(values < 1 - 1e-9)[::-1][:dimensions]
        if len(telling) == dimensions:
            return values[telling], vectors[:, telling]
        wanted *= 4
    raise ValueError("the points are cut off from one another: the bandwidth is too small")
