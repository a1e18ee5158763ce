"""The cheapest cut into groups of layers, against every cut."""

import itertools

import numpy as np
import pytest

from mkaq.merge.segment import cheapest_groups, groups_of, longest_group

Costs = dict[tuple[int, int], float]


def all_cuts(layers: int) -> list[list[list[int]]]:
    """Every way to cut layers into neighbouring groups."""
    cuts = []
    for chosen in itertools.product((False, True), repeat=layers - 1):
        ends = [0, *[i + 1 for i, cut in enumerate(chosen) if cut], layers]
        cuts.append([list(range(a, b)) for a, b in itertools.pairwise(ends)])
    return cuts


def price(cut: list[list[int]], costs: Costs) -> float:
    """Infinite if a group is not allowed."""
    return sum(costs.get((g[0], len(g)), float("inf")) for g in cut if len(g) > 1)


def brute_force(costs: Costs, layers: int, removed: int) -> float:
    return min(price(cut, costs) for cut in all_cuts(layers) if len(cut) == layers - removed)


@pytest.mark.parametrize(("layers", "seed"), list(itertools.product([6, 7, 8], range(3))))
def test_no_cut_is_cheaper(layers: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs = {
        (first, length): float(rng.uniform() * length)
        for first in range(layers)
        for length in range(2, layers - first + 1)
    }
    for removed in range(layers):
        groups = cheapest_groups(costs, layers, removed)
        assert list(itertools.chain(*groups)) == list(range(layers))
        assert len(groups) == layers - removed
        assert price(groups, costs) == pytest.approx(brute_force(costs, layers, removed))


@pytest.mark.parametrize("seed", range(6))
def test_groups_that_are_not_listed_are_not_used(seed: int) -> None:
    rng = np.random.default_rng(seed)
    every = [(first, length) for first in range(7) for length in (2, 3, 4) if first + length <= 7]
    costs = {group: float(rng.uniform(-1, 1)) for group in every if rng.random() < 0.4}
    for removed in range(7):
        expected = brute_force(costs, 7, removed)
        if expected == float("inf"):
            with pytest.raises(ValueError, match=rf"no cut of 7 layers .* removes {removed}"):
                cheapest_groups(costs, 7, removed)
        else:
            assert price(cheapest_groups(costs, 7, removed), costs) == pytest.approx(expected)


def test_known_cuts() -> None:
    costs = {(0, 2): 1.0, (1, 2): 0.1, (2, 2): 1.0, (1, 3): 5.0}
    assert cheapest_groups(costs, 4, 0) == [[0], [1], [2], [3]]
    assert cheapest_groups(costs, 4, 1) == [[0], [1, 2], [3]]
    assert cheapest_groups(costs, 4, 2) == [[0, 1], [2, 3]]  # not the pair that is cheapest alone
    with pytest.raises(ValueError, match="removes 3"):
        cheapest_groups(costs, 4, 3)
    with pytest.raises(ValueError, match="removes 1"):
        cheapest_groups({}, 4, 1)


@pytest.mark.parametrize(
    ("free", "removed", "longest"), [(10, 1, 3), (10, 5, 3), (10, 6, 4), (10, 8, 6), (30, 8, 3), (4, 3, 4)]
)
def test_longest_group_is_one_more_than_even_groups(free: int, removed: int, longest: int) -> None:
    assert longest_group(free, removed) == longest


@pytest.mark.parametrize(
    ("removed", "groups"),
    [
        ([], [[0], [1], [2], [3], [4]]),
        ([2], [[0], [1, 2], [3], [4]]),
        ([4, 2, 3], [[0], [1, 2, 3, 4]]),
        ([1, 3], [[0, 1], [2, 3], [4]]),
        ([0], [[0, 1], [2], [3], [4]]),  # joins the first kept one
        ([1, 0], [[0, 1, 2], [3], [4]]),
        ([0, 2], [[0, 1, 2], [3], [4]]),
    ],
)
def test_removed_layers_join_the_one_before(removed: list[int], groups: list[list[int]]) -> None:
    assert groups_of(removed, 5) == groups
