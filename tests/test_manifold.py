"""Diffusion maps: they find the angle of points on a circle, and are the eigenvectors of a Markov matrix."""

import numpy as np
import numpy.typing as npt
import pytest

from mkaq.merge.manifold import diffusion_map, squared_distances
from mkaq.merge.npib import equal_frequency_cells, npib

Array = npt.NDArray[np.float64]


def circle(count: int = 300, crowding: float = 0.8, features: int = 40) -> tuple[Array, Array]:
    """Angles, denser on one side, and their points, turned at random in many dimensions."""
    rng = np.random.default_rng(3)
    even = rng.uniform(0, 2 * np.pi, count)
    angles = even + crowding * np.sin(even)
    plane = np.linalg.qr(rng.normal(size=(features, 2)))[0]
    return angles, np.column_stack([np.cos(angles), np.sin(angles)]) @ plane.T


def agreement(angles: Array, coordinates: Array) -> float:
    """How well the embedding's own angle is the true one, up to a turn and a reflection: 1 at best."""
    true = np.exp(1j * angles)
    found = coordinates / np.sqrt((coordinates**2).mean(axis=0))
    found = found[:, 0] + 1j * found[:, 1]
    found /= np.abs(found)
    return max(abs((true * found).mean()), abs((true * found.conj()).mean()))


def markov(points: Array, width: float, alpha: float) -> tuple[Array, Array]:
    """The Markov matrix, by the book, and its stationary distribution."""
    kernel = np.array([[np.exp(-((a - b) @ (a - b)) / (2 * width**2)) for a in points] for b in points])
    density = kernel.sum(axis=1)
    kernel = kernel / density[:, None] ** alpha / density[None, :] ** alpha
    degree = kernel.sum(axis=1)
    return kernel / degree[:, None], degree / degree.sum()


def test_circle_gives_back_the_angle() -> None:
    angles, points = circle(crowding=0.5)
    coordinates = diffusion_map(points, bandwidth=0.2, alpha=1)
    assert agreement(angles, coordinates) > 0.998
    around = np.unwrap(np.arctan2(*coordinates[np.argsort(angles)].T))
    steps = np.diff(around)
    assert (steps > -1e-9).all() or (steps < 1e-9).all()


def test_only_alpha_one_is_insensitive_to_density() -> None:
    angles, points = circle()
    plain, half, full = (
        agreement(angles, diffusion_map(points, bandwidth=0.3, alpha=a)) for a in (0, 0.5, 1)
    )
    assert plain < 0.94 < half < 0.98 and full > 0.99


@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_coordinates_are_the_leading_eigenvectors_of_the_markov_matrix(alpha: float) -> None:
    points = np.random.default_rng(0).normal(size=(40, 5))
    matrix, stationary = markov(points, 2.0, alpha)
    eigenvalues = np.sort(np.linalg.eigvals(matrix).real)[::-1][1:4]
    plain = diffusion_map(points, dimensions=3, bandwidth=2.0, alpha=alpha, time=0)
    assert np.allclose(matrix @ plain, plain * eigenvalues)
    assert np.allclose(stationary @ plain**2, 1)
    assert np.allclose(stationary @ plain, 0)


def test_time_scales_by_powers_of_the_eigenvalues() -> None:
    points = np.random.default_rng(0).normal(size=(40, 5))
    matrix, _ = markov(points, 2.0, 0.5)
    eigenvalues = np.sort(np.linalg.eigvals(matrix).real)[::-1][1:3]
    plain = diffusion_map(points, bandwidth=2.0, time=0)
    for time in (0.5, 1, 3):
        assert np.allclose(diffusion_map(points, bandwidth=2.0, time=time), plain * eigenvalues**time)


def test_default_bandwidth_is_the_median_distance() -> None:
    points = np.random.default_rng(0).normal(size=(30, 5))
    distances = [np.linalg.norm(points[i] - points[j]) for i in range(30) for j in range(i)]
    given = diffusion_map(points, bandwidth=float(np.median(distances)))
    assert np.allclose(diffusion_map(points), given)


def test_sign_is_fixed_whatever_the_pose_and_order() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(60, 6)) * np.arange(1, 7)
    coordinates = diffusion_map(points, dimensions=3)
    largest = np.abs(coordinates).argmax(axis=0)
    assert (coordinates[largest, range(3)] > 0).all()
    turn, order = np.linalg.qr(rng.normal(size=(6, 6)))[0], rng.permutation(60)
    assert np.allclose(diffusion_map(-points @ turn + 5, dimensions=3), coordinates)
    assert np.allclose(diffusion_map(points[order], dimensions=3), coordinates[order])


def test_too_few_points_raise() -> None:
    points = np.random.default_rng(0).normal(size=(4, 3))
    assert diffusion_map(points).shape == (4, 2)
    with pytest.raises(ValueError, match="3 points are too few for 2"):
        diffusion_map(points[:3])


def test_identical_points_raise() -> None:
    with pytest.raises(ValueError, match="the same"):
        diffusion_map(np.ones((20, 3)))


@pytest.mark.parametrize("far", [2, 40])
def test_points_cut_off_from_the_others_leave_it_finite(far: int) -> None:
    """Hidden states of a first token are a thousand times as large as the others in many models."""
    points = np.random.default_rng(0).normal(size=(100, 8))
    points[:far] *= 1000
    coordinates = diffusion_map(points)
    assert np.isfinite(coordinates).all() and coordinates[far:].std(axis=0).min() > 1e-6


def test_points_all_cut_off_from_one_another_raise() -> None:
    with pytest.raises(ValueError, match="bandwidth"):
        diffusion_map(np.random.default_rng(0).normal(size=(100, 8)), bandwidth=1e-3)


def test_points_far_from_the_rest_do_not_hide_how_alike_two_layers_are() -> None:
    """Two states a thousand times as large as the others would take both coordinates for themselves."""
    rng = np.random.default_rng(0)
    first = rng.uniform(size=(1000, 3)) @ rng.normal(size=(3, 64)) * 3 + rng.normal(size=(1000, 64)) * 0.1
    second = first + rng.normal(size=first.shape) * 0.1
    first[:2] = second[:2] = rng.normal(size=(2, 64)) * 1000
    cells = [equal_frequency_cells(diffusion_map(states), 4) for states in (first, second)]
    assert npib(*cells) > 0.9


def test_distances_by_product_are_those_by_hand_also_far_from_the_origin() -> None:
    points = np.random.default_rng(0).normal(size=(60, 7)) + 1e4
    by_hand = ((points[:, None] - points[None, :]) ** 2).sum(-1)
    assert np.allclose(squared_distances(points), by_hand, rtol=1e-9, atol=1e-9)
    twins = np.repeat(points[:2], 3, axis=0)
    assert (squared_distances(twins)[:3, :3] == 0).all()


def test_few_eigenvectors_are_those_of_all() -> None:
    points = np.cumsum(np.random.default_rng(2).normal(size=(400, 30)), axis=1)
    few = diffusion_map(points)  # by Lanczos
    many = diffusion_map(points, dimensions=120)[:, :2]  # too many for it
    assert np.allclose(few, many, rtol=1e-6, atol=1e-9)
