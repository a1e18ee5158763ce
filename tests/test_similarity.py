"""NPIB: a normalized mutual information of quantile cells."""

import math

import numpy as np
import numpy.typing as npt
import pytest

from mkaq.merge.npib import entropy, equal_frequency_cells, npib, similarity_matrix

Array = npt.NDArray[np.float64]


def gaussians(rho: float, count: int) -> tuple[Array, Array]:
    """Two columns of standard normal numbers of correlation rho."""
    first, other = np.random.default_rng(1).normal(size=(2, count, 1))
    return first, rho * first + math.sqrt(1 - rho**2) * other


def test_one_with_itself_symmetric_and_between_zero_and_one() -> None:
    rng = np.random.default_rng(0)
    cells = [equal_frequency_cells(rng.normal(size=(200, 2)), 4) for _ in range(4)]
    cells.append(np.where(rng.random(200) < 0.2, 0, cells[0]))
    matrix = similarity_matrix(cells)
    assert all(npib(own, own) == pytest.approx(1) for own in cells)
    for i, first in enumerate(cells):
        for j, second in enumerate(cells):
            assert matrix[i, j] == pytest.approx(npib(second, first)) == pytest.approx(npib(first, second))
    assert (matrix >= 0).all() and (matrix <= 1).all()
    assert matrix[0, 4] > 0.5 > matrix[0, 1]


def test_known_value() -> None:
    first, second = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    h_first, h_joint = math.log(2), 1.5 * math.log(2)
    h_second = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    expected = (h_first + h_second - h_joint) / math.sqrt(h_first * h_second)
    assert npib(first, second, "none") == pytest.approx(expected)
    assert similarity_matrix([first, second], "none")[0, 1] == pytest.approx(expected)
    corrected = [h_first + 1 / 8, h_second + 1 / 8, h_joint + 2 / 8]
    expected = (corrected[0] + corrected[1] - corrected[2]) / math.sqrt(corrected[0] * corrected[1])
    assert npib(first, second, "miller_madow") == pytest.approx(expected)


def test_independent_is_about_zero() -> None:
    first, second = np.random.default_rng(0).normal(size=(2, 50_000, 2))
    assert npib(equal_frequency_cells(first, 4), equal_frequency_cells(second, 4)) < 0.001
    assert (
        npib(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])) == 0
    )  # the correction alone would make it negative


def test_constant_labels_share_nothing_but_are_alike() -> None:
    constant, other = np.zeros(10, dtype=np.int64), np.arange(10)
    assert npib(constant, constant) == 1
    assert npib(constant, other) == npib(other, constant) == 0


def test_rises_with_correlation() -> None:
    cells = [[equal_frequency_cells(x, 8) for x in gaussians(rho, 4000)] for rho in (0, 0.3, 0.6, 0.9, 0.99)]
    values = [npib(*pair) for pair in cells]
    assert values == sorted(values) and values[0] < 0.01 and values[-1] > 0.6


@pytest.mark.parametrize("rho", [0.3, 0.6, 0.8])
def test_mutual_information_of_gaussians_is_the_closed_form(rho: float) -> None:
    bins = 48
    first, second = (equal_frequency_cells(x, bins) for x in gaussians(rho, 200_000))
    information = npib(first, second) * math.log(bins)
    assert information == pytest.approx(-0.5 * math.log(1 - rho**2), rel=0.03)


def test_miller_madow_takes_the_bias_away() -> None:
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, 32, 200) for _ in range(200)]
    plain = np.mean([entropy(d, "none") for d in draws]) - math.log(32)
    corrected = np.mean([entropy(d) for d in draws]) - math.log(32)
    assert plain == pytest.approx(-31 / 400, abs=0.01)
    assert abs(corrected) < 0.005
    assert entropy(np.array([5, 5, 9, 9])) == pytest.approx(math.log(2) + 1 / 8)


@pytest.mark.parametrize("count", [64, 100])
def test_bins_are_equally_full(count: int) -> None:
    points = np.random.default_rng(0).lognormal(size=(count, 2))
    points[: count // 3, 1] = 7  # ties
    cells = equal_frequency_cells(points, 4)
    for axis in (cells // 4, cells % 4):
        filled = np.bincount(axis, minlength=4)
        assert len(filled) == 4 and filled.max() - filled.min() <= 1
    for axis, column in ((cells // 4, points[:, 0]), (cells % 4, points[:, 1])):
        assert (np.diff(axis[np.argsort(column, kind="stable")]) >= 0).all()


def test_monotone_maps_and_new_names_of_cells_change_nothing() -> None:
    first, second = (x[:, 0] for x in gaussians(0.7, 500))
    points = np.column_stack([first, second])
    cells = equal_frequency_cells(points, 5)
    assert np.array_equal(equal_frequency_cells(np.column_stack([np.exp(first), second**3]), 5), cells)
    other = equal_frequency_cells(second[:, None], 5)
    names = np.random.default_rng(0).permutation(25)
    assert npib(names[cells], other) == pytest.approx(npib(cells, other))
