"""Diffusion maps: the shape of a layer's hidden states in a few coordinates (MKA section 3.1)."""

from contextlib import suppress

import numpy as np
import numpy.typing as npt
from scipy.linalg import eigh
from scipy.sparse.linalg import ArpackNoConvergence, eigsh
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
    squares = squared_distances(np.asarray(states, dtype=np.float64))
    width = median_distance(squares) if bandwidth is None else bandwidth
    if not width > 0:
        raise ValueError("more than half of the points are the same: no bandwidth")
    kernel = np.exp(squares / (-2 * width**2))
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


def squared_distances(points: Array) -> Array:
    """|x - y|^2 of all pairs by one matrix product, shape (n, n); exactly 0 of a point with itself.

    Points are centred first, so that little is lost where their common part is large, and what is
    below the rounding of the product is 0.
    """
    points = points - points.mean(axis=0)
    product = points @ points.T
    norms = product.diagonal()
    squares = norms[:, None] + norms[None, :]
    rounding = 1e-14 * squares
    squares = squares - 2 * product
    squares[squares < rounding] = 0.0
    np.fill_diagonal(squares, 0.0)
    result: Array = squares
    return result


def median_distance(squares: Array) -> float:
    """The median of the distances of all pairs, from their squares."""
    pairs = squares[np.triu_indices(len(squares), 1)]
    return float(np.median(np.sqrt(pairs)))


def _leading(kernel: Array, dimensions: int) -> tuple[Array, Array]:
    """The largest eigenvalues below 1, falling, and their eigenvectors as columns.

    Lanczos, and all eigenvectors where that does not come to an end: with many points that are cut off
    from the rest, each of which has the eigenvalue 1.
    """
    count, wanted = len(kernel), dimensions + 9
    with threadpool_limits(1):  # small: threads only get in each other's way on a busy machine
        if wanted < count // 4:
            with suppress(ArpackNoConvergence):
                values, vectors = eigsh(kernel, wanted, which="LA", v0=np.ones(count))
                order = np.argsort(values)
                if found := _telling(values[order], vectors[:, order], dimensions):
                    return found
        values, vectors = eigh(kernel)
        if found := _telling(values, vectors, dimensions):
            return found
    raise ValueError("the points are cut off from one another: the bandwidth is too small")


def _telling(values: Array, vectors: Array, dimensions: int) -> tuple[Array, Array] | None:
    telling = np.flatnonzero(values < 1 - 1e-9)[::-1][:dimensions]
    return (values[telling], vectors[:, telling]) if len(telling) == dimensions else None
