"""Diffusion maps: a layer's hidden states in a few coordinates (MKA section 3.1)."""

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

    K_ij = exp(-|x_i - x_j|^2 / (2 s^2)) is divided by (d_i d_j)^alpha, d_i = sum_j K_ij, and normalized to a
    Markov matrix. The coordinates are its leading non-trivial right eigenvectors times eigenvalue^time, with
    the sign that makes the largest entry positive. Eigenvectors of eigenvalue 1 are trivial: they only
    indicate points that are disconnected from the rest, as the states of a first token often are.

    Args:
        states: Points, shape (n, features).
        dimensions: Number of coordinates.
        bandwidth: s; the median pairwise distance if None.
        alpha: Exponent of the density normalization, in [0, 1].
        time: Diffusion time.

    Returns:
        Shape (n, dimensions).

    Raises:
        ValueError: If there are too few points, most of them coincide, or all are disconnected.
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
    """|x - y|^2 of all pairs by one matrix product, shape (n, n); exactly 0 on the diagonal.

    Points are centred first, which avoids cancellation if their mean is large. Values below the rounding
    error of the product are set to 0.
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
    """The median distance of all pairs, from their squared distances."""
    pairs = squares[np.triu_indices(len(squares), 1)]
    return float(np.median(np.sqrt(pairs)))


def _leading(kernel: Array, dimensions: int) -> tuple[Array, Array]:
    """The largest eigenvalues below 1, in descending order, and their eigenvectors as columns.

    Lanczos, or a full decomposition if Lanczos does not converge or finds too few of them: each point that is
    disconnected from the rest adds an eigenvalue of 1.
    """
    count, wanted = len(kernel), dimensions + 9
    with threadpool_limits(1):  # the matrix is small: more threads are slower on a busy machine
        if wanted < count // 4:
            with suppress(ArpackNoConvergence):
                values, vectors = eigsh(kernel, wanted, which="LA", v0=np.ones(count))
                order = np.argsort(values)
                if pairs := _nontrivial(values[order], vectors[:, order], dimensions):
                    return pairs
        values, vectors = eigh(kernel)
        if pairs := _nontrivial(values, vectors, dimensions):
            return pairs
    raise ValueError("the points are cut off from one another: the bandwidth is too small")


def _nontrivial(values: Array, vectors: Array, dimensions: int) -> tuple[Array, Array] | None:
    chosen = np.flatnonzero(values < 1 - 1e-9)[::-1][:dimensions]
    return (values[chosen], vectors[:, chosen]) if len(chosen) == dimensions else None
