"""The choice of the layers that become one, from how alike layers are and from what groups cost."""

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
    """What a choice rests on.

    Attributes:
        similarity: NPIB of every pair of layers, shape (layers, layers), where it was asked for.
        costs: For each candidate group (first layer, number of layers) the measured divergence of the
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
    """Decides which layers become one, with which weights.

    Args:
        analysis: Of the source.
        walk: Over the source.
        samples: On which coefficients are measured, if they are.
        removed: How many layers go.
        order: `similarity`, `back_to_front` or `measured`.
        coefficient: Of averages; None: there are none.
        protect: Layers that stay at the start and at the end.
        progress: Told of every group whose coefficient is measured.
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
    """The best coefficient of every group, each on what the compressed layers before it give."""
    original = walk.embed(samples.tokens)
    compressed = walk.activations.copy(original)
    found = {}
    for group in progress.track(groups, "measure coefficients"):
        fixed = 1.0 if len(group) == 1 else None
        found[group[0]] = best_average(walk, group, original, compressed, samples, fixed)[0]
    return found
