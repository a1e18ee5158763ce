"""Merge plans of models that nobody thought of, against what is computed the long way."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mkaq.errors import UsageError
from mkaq.merge.groups import MergePlan, chain_plan, layers_to_remove, plan_merge
from mkaq.merge.segment import candidate_groups, cheapest_groups, groups_of, longest_group

few = settings(derandomize=True, database=None, deadline=None, max_examples=150)
Groups = list[list[int]]


@st.composite
def jobs(draw: st.DrawFn, most: int = 12) -> tuple[int, int, tuple[int, int]]:
    """Layers of a model, layers to remove, protected layers: together they can be done."""
    layers = draw(st.integers(2, most))
    first = draw(st.integers(0, layers - 2))
    last = draw(st.integers(0, layers - 2 - first))
    return layers, draw(st.integers(1, layers - first - last - 1)), (first, last)


def check_partition(groups: Groups, layers: int, removed: int, protect: tuple[int, int]) -> None:
    """Every layer once and in order, as many groups as asked for, protected layers alone."""
    assert [index for group in groups for index in group] == list(range(layers))
    assert len(groups) == layers - removed
    assert all(len(group) == 1 for group in groups[: protect[0]] + groups[len(groups) - protect[1] :])


def partitions(layers: int) -> list[Groups]:
    """Every way to cut layers into groups of neighbours."""
    ends = itertools.product((False, True), repeat=layers - 1)
    cuts = ([0, *(i + 1 for i, cut in enumerate(chosen) if cut), layers] for chosen in ends)
    return [[list(range(a, b)) for a, b in itertools.pairwise(cut)] for cut in cuts]


@given(
    layers=st.integers(1, 300),
    ratio=st.floats(0, 1, exclude_min=True, exclude_max=True),
    protect=st.tuples(st.integers(0, 99), st.integers(0, 99)),
)
@few
def test_a_ratio_removes_the_nearest_number_of_layers(
    layers: int, ratio: float, protect: tuple[int, int]
) -> None:
    exact = Fraction(ratio) * layers
    possible = range(1, layers - sum(protect))
    nearest = [n for n in range(layers + 1) if abs(n - exact) <= Fraction(1, 2) + Fraction(1, 10**12)]
    try:
        removed = layers_to_remove(layers, ratio, None, protect)
    except UsageError as error:
        assert any(n not in possible for n in nearest)
        assert f"{max(layers - sum(protect), 0)} are not protected" in error.what
        return
    assert removed in possible and removed in nearest


@given(layers=st.integers(1, 9), asked=st.integers(0, 9), first=st.integers(0, 9), last=st.integers(0, 9))
@few
def test_at_least_one_layer_that_is_not_protected_is_left(
    layers: int, asked: int, first: int, last: int
) -> None:
    if asked >= 1 and asked + 1 <= layers - first - last:
        assert layers_to_remove(layers, 0.5, asked, (first, last)) == asked
    else:
        with pytest.raises(UsageError, match=f"{asked} of {layers} layers"):
            layers_to_remove(layers, 0.5, asked, (first, last))


@given(job=jobs(), seed=st.integers(0, 999), order=st.sampled_from(["similarity", "back_to_front"]))
@few
def test_merges_one_by_one(job: tuple[int, int, tuple[int, int]], seed: int, order: str) -> None:
    layers, removed, (first, last) = job
    similarity = np.random.default_rng(seed).integers(0, 5, (layers, layers)) / 4  # with ties
    plan = plan_merge(similarity, removed, order, "similarity", (first, last))
    check_partition(plan.groups, layers, removed, (first, last))
    groups = [[index] for index in range(layers)]
    for merge in plan.merges:  # each is the best of those that there were
        pairs = list(itertools.pairwise(groups))[first : len(groups) - 1 - last]
        scores = [similarity[one[-1], two[-1]] for one, two in pairs]
        at = scores.index(max(scores)) if order == "similarity" else len(pairs) - 1
        assert (merge.into, merge.from_) == (pairs[at][0][0], pairs[at][1][0])
        assert merge.similarity == merge.coefficient == scores[at]
        groups[first + at : first + at + 2] = [pairs[at][0] + pairs[at][1]]
    assert groups == plan.groups
    check_weights(plan)


def check_weights(plan: MergePlan) -> None:
    """The weights of a new layer sum to 1."""
    assert [sum(weights.values()) for weights in plan.layers] == pytest.approx([1.0] * len(plan.layers))


@given(
    groups=st.integers(1, 7).flatmap(lambda layers: st.sampled_from(partitions(layers))), c=st.floats(0, 1)
)
@few
def test_a_chain_weighs_as_its_merges_do(groups: Groups, c: float) -> None:
    plan = chain_plan(groups, c, None, {})
    assert plan.groups == groups and plan.kept == [group[0] for group in groups]
    check_weights(plan)
    for group, weights in zip(groups, plan.layers, strict=True):
        for place, index in enumerate(group):
            share = (1 - c) ** (place > 0) * c ** (len(group) - 1 - place)
            assert weights[index] == pytest.approx(share)


@given(layers=st.integers(1, 8), data=st.data())
@few
def test_no_partition_is_cheaper(layers: int, data: st.DataObject) -> None:
    every = [(first, length) for first in range(layers) for length in range(2, layers - first + 1)]
    allowed = data.draw(st.lists(st.sampled_from(every), unique=True)) if every else []
    costs = {group: float(data.draw(st.integers(-3, 9))) for group in allowed}
    prices: dict[int, float] = dict.fromkeys(range(layers), math.inf)
    for cut in partitions(layers):
        price = sum(costs.get((group[0], len(group)), math.inf) for group in cut if len(group) > 1)
        prices[layers - len(cut)] = min(prices[layers - len(cut)], price)
    for removed, least in prices.items():
        if least == math.inf:
            with pytest.raises(ValueError, match=f"removes {removed}"):
                cheapest_groups(costs, layers, removed)
            continue
        groups = cheapest_groups(costs, layers, removed)
        check_partition(groups, layers, removed, (0, 0))
        assert sum(costs[group[0], len(group)] for group in groups if len(group) > 1) == least


@given(job=jobs(40))
@few
def test_the_groups_measured_are_enough(job: tuple[int, int, tuple[int, int]]) -> None:
    layers, removed, protect = job
    candidates = candidate_groups(layers, protect, removed)
    assert len(set(candidates)) == len(candidates)
    longest = longest_group(layers - sum(protect), removed)
    for first, length in candidates:
        assert protect[0] <= first and first + length <= layers - protect[1] and 2 <= length <= longest
    groups = cheapest_groups(dict.fromkeys(candidates, 1.0), layers, removed)
    check_partition(groups, layers, removed, protect)


@given(layers=st.integers(1, 30), data=st.data())
@few
def test_removed_layers_join_the_kept_one_before(layers: int, data: st.DataObject) -> None:
    removed = data.draw(st.lists(st.integers(1, layers - 1), unique=True)) if layers > 1 else []
    groups = groups_of(removed, layers)
    check_partition(groups, layers, len(removed), (0, 0))
    assert {index for group in groups for index in group[1:]} == set(removed)
