"""Which layers are merged: how many, in which order, with which weights."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mkaq.errors import UsageError
from mkaq.merge.groups import Merge, MergePlan, coefficient_of, plan_merge
from mkaq.stages.merge import MergeSection, ProtectSection

Matrix = npt.NDArray[np.float64]


def section(first: int = 0, last: int = 0, **settings: Any) -> MergeSection:
    paper = {"order": "similarity", "coefficient": "similarity"}
    return MergeSection(protect=ProtectSection(first=first, last=last), **paper | settings)


def planned(merge: MergeSection, similarity: Matrix) -> MergePlan:
    """The plan of a section of the recipe."""
    removed, protect = merge.removed(len(similarity)), (merge.protect.first, merge.protect.last)
    return plan_merge(similarity, removed, merge.order, merge.coefficient, protect)


def symmetric(rows: Sequence[Sequence[float]]) -> Matrix:
    """A matrix from its upper triangle, row by row, with a unit diagonal."""
    matrix = np.eye(len(rows) + 1)
    for i, row in enumerate(rows):
        matrix[i, i + 1 :] = matrix[i + 1 :, i] = row
    return matrix


#                       0-1  0-2  0-3  0-4    1-2  1-3   1-4    2-3  2-4    3-4
MATRIX = symmetric([[0.5, 0.7, 0.1, 0.1], [0.9, 0.95, 0.1], [0.4, 0.1], [0.6]])


def random_similarity(layers: int) -> Matrix:
    matrix = np.random.default_rng(layers).uniform(size=(layers, layers))
    matrix = (matrix + matrix.T) / 2
    np.fill_diagonal(matrix, 1)
    return matrix


def replay(plan: MergePlan, layers: int) -> list[dict[int, float]]:
    """The new layers, from the list of merges alone."""
    groups = {index: {index: 1.0} for index in range(layers)}
    for merge in plan.merges:
        share, gone = merge.coefficient, groups.pop(merge.from_)
        kept = groups[merge.into]
        groups[merge.into] = {k: v * share for k, v in kept.items()} | {
            k: v * (1 - share) for k, v in gone.items()
        }
    return [groups[index] for index in sorted(groups)]


@pytest.mark.parametrize(
    ("ratio", "layers", "removed"), [(0.4375, 32, 14), (0.5, 5, 3), (0.3, 4, 1), (0.4, 4, 2), (0.125, 12, 2)]
)
def test_ratio_is_rounded_to_the_nearest_layer(ratio: float, layers: int, removed: int) -> None:
    assert section(ratio=ratio).removed(layers) == removed


def test_layers_are_taken_at_their_word_up_to_the_limit() -> None:
    assert [section(1, 2, layers=n).removed(8) for n in (1, 4)] == [1, 4]
    with pytest.raises(UsageError, match=r"5 of 8 layers.*5 are not protected, so 1 to 4 can"):
        section(1, 2, layers=5).removed(8)


def test_nothing_to_remove_and_nothing_but_protected_layers_raise() -> None:
    with pytest.raises(UsageError, match="0 of 8 layers"):
        section(ratio=0.01).removed(8)
    with pytest.raises(UsageError, match="0 are not protected"):
        section(5, 5, layers=1).removed(8)
    with pytest.raises(UsageError, match="4 of 5 layers"):
        planned(section(1, 1, layers=4), MATRIX)


def test_most_similar_first_and_similarity_looked_up_anew() -> None:
    plan = planned(section(layers=2), MATRIX)
    assert plan.merges == (Merge(1, 2, 0.9, 0.9), Merge(0, 1, 0.7, 0.7))  # 0-2, as 1-2 stands for layer 2
    assert plan.layers[0] == pytest.approx({0: 0.7, 1: 0.3 * 0.9, 2: 0.3 * 0.1})
    assert plan.layers[1:] == ({3: 1.0}, {4: 1.0})
    assert plan.kept == [0, 3, 4]
    assert planned(section(layers=3), MATRIX).merges[2] == Merge(3, 4, 0.6, 0.6)


def test_equally_similar_pairs_merge_from_the_front() -> None:
    assert planned(section(layers=1), np.full((5, 5), 0.5)).merges[0].into == 0


def test_back_to_front_takes_the_last_pair_again_and_again() -> None:
    plan = planned(section(layers=2, order="back_to_front"), MATRIX)
    assert plan.merges == (Merge(3, 4, 0.6, 0.6), Merge(2, 3, 0.1, 0.1))  # 2-4, as 3-4 stands for layer 4
    assert plan.layers[2] == pytest.approx({2: 0.1, 3: 0.9 * 0.6, 4: 0.9 * 0.4})
    protected = planned(section(0, 2, layers=1, order="back_to_front"), MATRIX)
    assert protected.merges == (Merge(1, 2, 0.9, 0.9),)


def test_protected_layers_are_left_alone() -> None:
    plan = planned(section(2, 0, layers=2), MATRIX)
    assert plan.layers[:2] == ({0: 1.0}, {1: 1.0})
    assert [(m.into, m.from_) for m in plan.merges] == [(3, 4), (2, 3)]
    plan = planned(section(0, 3, layers=1), MATRIX)
    assert plan.layers == ({0: 0.5, 1: 0.5}, {2: 1.0}, {3: 1.0}, {4: 1.0})


def test_coefficient_rules() -> None:
    assert coefficient_of("similarity", 0.83) == 0.83
    assert coefficient_of("sigmoid", 0.5) == pytest.approx(0.6224593312)
    assert coefficient_of(0.25, 0.83) == 0.25
    merge = planned(section(layers=1, coefficient="sigmoid"), MATRIX).merges[0]
    assert (merge.coefficient, merge.similarity) == (pytest.approx(1 / (1 + math.exp(-0.9))), 0.9)
    assert planned(section(layers=1, coefficient=0.25), MATRIX).layers[1] == {1: 0.25, 2: 0.75}


@pytest.mark.parametrize("order", ["similarity", "back_to_front"])
@pytest.mark.parametrize("coefficient", ["similarity", "sigmoid", 0.3])
def test_chains_of_merges_give_the_layers(order: str, coefficient: str | float) -> None:
    for layers in (4, 9, 16):
        settings = {"layers": layers - 3, "order": order, "coefficient": coefficient}
        plan = planned(section(1, 1, **settings), random_similarity(layers))
        assert len(plan.layers) == 3
        assert [old for weights in plan.layers for old in weights] == list(range(layers))
        assert [sum(weights.values()) for weights in plan.layers] == pytest.approx([1, 1, 1])
        for found, expected in zip(plan.layers, replay(plan, layers), strict=True):
            assert found == pytest.approx(expected)


def test_json_names_every_merge_and_layer() -> None:
    data = planned(section(layers=1), MATRIX).as_json()
    assert data["merges"] == [{"into": 1, "from": 2, "coefficient": 0.9, "similarity": 0.9}]
    assert data["layers"][1] == {"new": 1, "from": {"1": 0.9, "2": pytest.approx(0.1)}}
    assert [layer["new"] for layer in data["layers"]] == [0, 1, 2, 3]
