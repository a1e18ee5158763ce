"""The choice of layers to merge, from their similarity or from the measured costs of groups."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mkaq.fit.hold_out import Samples
from mkaq.merge.cost import best_average
from mkaq.merge.groups import MergePlan, chain_plan, plan_merge
from mkaq.merge.segment import cheapest_groups
from mkaq.progress import Progress
from mkaq.walk.walk import LayerWalk


@dataclass(frozen=True)
class Analysis:
    """The measurements that a choice uses.

    Attributes:
        similarity: NPIB of every pair of layers, shape (layers, layers); None if not measured.
        costs: For each candidate group (first layer, number of layers), the measured divergence of the
            output, in nats.
    """

    similarity: npt.NDArray[np.float64] | None
    costs: Mapping[tuple[int, int], float]


def choose(
    analysis: Analysis,
    walk: LayerWalk,
    samples: Samples,
    removed: int,
    order: str,
    coefficient: str | float | None,
    protect: tuple[int, int],
    progress: Progress,
) -> MergePlan:
    """Decides which layers are merged, and with which weights.

    Args:
        analysis: Measurements of the source.
        walk: A walk over the source.
        samples: Samples for measuring coefficients.
        removed: Layers to remove.
        order: `similarity`, `back_to_front` or `measured`.
        coefficient: The recipe's coefficient; None if layers are not averaged.
        protect: Layers left alone at the start and the end.
        progress: Reports every group whose coefficient is measured.
    """
    if order == "measured":
        groups = walk.ranks.tell(cheapest_groups(analysis.costs, walk.num_layers, removed))
    else:
        assert analysis.similarity is not None
        plan = plan_merge(analysis.similarity, removed, order, coefficient, protect)
        if coefficient != "measured":
            return plan
        groups = plan.groups
    coefficients = {}
    if coefficient == "measured":
        coefficients = measure_coefficients(walk, samples, groups, progress)
    return chain_plan(groups, coefficient, analysis.similarity, coefficients)


def measure_coefficients(
    walk: LayerWalk, samples: Samples, groups: list[list[int]], progress: Progress
) -> dict[int, float]:
    """The best coefficient of each group, by first layer, given the compressed layers before it."""
    original = walk.embed(samples.tokens)
    compressed = walk.activations.copy(original)
    coefficients = {}
    for group in progress.track(groups, "measure coefficients"):
        fixed = 1.0 if len(group) == 1 else None
        coefficients[group[0]] = best_average(walk, group, original, compressed, samples, fixed)[0]
    return coefficients
