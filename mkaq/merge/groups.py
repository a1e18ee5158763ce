"""The merge plan: which layers are merged, in which order and with which weights."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mkaq.errors import UsageError


@dataclass(frozen=True)
class Merge:
    """One merge of two neighbouring groups of layers.

    Attributes:
        into: First layer of the earlier group, which stays.
        from_: First layer of the later group, which is absorbed.
        coefficient: Weight of the earlier group.
        similarity: NPIB of the last layers of the two groups, if known.
    """

    into: int
    from_: int
    coefficient: float
    similarity: float | None


@dataclass(frozen=True)
class MergePlan:
    """The merges in order, and every new layer as a weighted sum of old ones.

    Attributes:
        merges: In the order in which they were chosen.
        layers: For each new layer, the old layers and their weights, which sum to 1.
    """

    merges: tuple[Merge, ...]
    layers: tuple[dict[int, float], ...]

    @property
    def groups(self) -> list[list[int]]:
        """For each new layer, the old layers in ascending order."""
        return [sorted(weights) for weights in self.layers]

    @property
    def kept(self) -> list[int]:
        """For each new layer, the old layer whose position in the config it takes."""
        return [min(weights) for weights in self.layers]

    def as_json(self) -> dict[str, Any]:
        """The plan as recorded in the manifest."""
        return {
            "merges": [
                {"into": m.into, "from": m.from_, "coefficient": m.coefficient, "similarity": m.similarity}
                for m in self.merges
            ],
            "layers": [
                {"new": new, "from": {str(old): weight for old, weight in weights.items()}}
                for new, weights in enumerate(self.layers)
            ],
        }


@dataclass
class _Group:
    layers: list[int]
    weights: dict[int, float] = field(default_factory=dict)


def layers_to_remove(
    num_layers: int, ratio: float | None, layers: int | None, protect: tuple[int, int]
) -> int:
    """The number of layers to remove from a model of `num_layers`.

    Args:
        num_layers: Layers of the model.
        ratio: Fraction of the layers to remove, used if `layers` is None.
        layers: Layers to remove.
        protect: Layers left alone at the start and the end.

    Raises:
        UsageError: If that leaves nothing to merge, or more than can be merged.
    """
    removed = layers if layers is not None else math.floor((ratio or 0) * num_layers + 0.5)
    free = num_layers - sum(protect)
    if not 1 <= removed < free:
        can = f"so {'1 to ' * (free > 2)}{free - 1} can" if free > 1 else "and it takes two to merge"
        what = f"{removed} of {num_layers} layers cannot be merged away: {max(free, 0)} are not protected"
        raise UsageError(
            f"{what}, {can}",
            where="merge",
            fix="change merge.ratio, merge.layers or merge.protect",
        )
    return removed


def coefficient_of(rule: str | float | None, similarity: float) -> float:
    """The weight of the earlier layer: the similarity itself, its sigmoid, or a fixed number."""
    if rule == "similarity":
        return similarity
    if rule == "sigmoid":
        return 1 / (1 + math.exp(-similarity))
    if rule is None or rule == "measured":  # not averaged, or set later by `chain_plan`
        return 0.5
    return float(rule)


def chain_plan(
    groups: Sequence[Sequence[int]],
    coefficient: str | float | None,
    similarity: npt.NDArray[np.float64] | None,
    coefficients: Mapping[int, float],
) -> MergePlan:
    """Averages given groups, each into its first layer.

    Args:
        groups: All layers of the model in order, in groups of neighbours.
        coefficient: The coefficient rule of the recipe.
        similarity: NPIB of every pair of layers, if the rule needs it.
        coefficients: Coefficient by first layer of the group, if the rule is `measured`.
    """
    merges, layers = [], []
    for group in groups:
        weights = {group[0]: 1.0}
        for before, index in itertools.pairwise(group):
            score = None if similarity is None else float(similarity[before, index])
            c = coefficients.get(group[0])
            if c is None:
                c = coefficient_of(coefficient, 1.0 if score is None else score)
            merges.append(Merge(group[0], index, c, score))
            weights = {old: weight * c for old, weight in weights.items()} | {index: 1 - c}
        layers.append(weights)
    return MergePlan(tuple(merges), tuple(layers))


def plan_merge(
    similarity: npt.NDArray[np.float64],
    removed: int,
    order: str,
    coefficient: str | float | None,
    protect: tuple[int, int],
) -> MergePlan:
    """Chooses the merges one by one.

    A merged group outputs the hidden state of its last layer, so the similarity of two neighbouring groups is
    that of their last layers, looked up again after each merge.

    Args:
        similarity: NPIB of every pair of layers, shape (layers, layers).
        removed: Layers to remove.
        order: `similarity` or `back_to_front`.
        coefficient: The coefficient rule of the recipe.
        protect: Layers left alone at the start and the end.
    """
    count = len(similarity)
    groups = [_Group([index], {index: 1.0}) for index in range(count)]
    first, last = protect
    merges = []
    for _ in range(removed):
        pairs = range(first, len(groups) - last - 1)
        at = _choose(order, groups, pairs, similarity)
        earlier, later = groups[at], groups[at + 1]
        score = float(similarity[earlier.layers[-1], later.layers[-1]])
        c = coefficient_of(coefficient, score)
        merges.append(Merge(earlier.layers[0], later.layers[0], c, score))
        weights = {index: weight * c for index, weight in earlier.weights.items()}
        weights |= {index: weight * (1 - c) for index, weight in later.weights.items()}
        groups[at : at + 2] = [_Group(earlier.layers + later.layers, weights)]
    return MergePlan(tuple(merges), tuple(group.weights for group in groups))


def _choose(order: str, groups: Sequence[_Group], pairs: range, similarity: npt.NDArray[np.float64]) -> int:
    if order == "back_to_front":
        return pairs[-1]
    return max(pairs, key=lambda at: (similarity[groups[at].layers[-1], groups[at + 1].layers[-1]], -at))
