"""The choice of the layers that become one: by similarity, back to front, or by what it costs."""

from dataclasses import dataclass, field

import torch

from mkaq.fit.hold_out import Samples, learning_samples
from mkaq.merge.compare import LayerSimilarity, compare_layers
from mkaq.merge.cost import best_average, by_average, by_channels, measure_groups
from mkaq.merge.groups import MergePlan, chain_plan, layers_to_remove, plan_merge
from mkaq.merge.segment import cheapest_groups, longest_group
from mkaq.progress import Progress
from mkaq.recipe import MergeSection
from mkaq.walk.walk import LayerWalk


@dataclass(frozen=True)
class Choice:
    """What is merged, and what led to it.

    Attributes:
        plan: The groups, and their weights if they are averaged.
        similarity: Of the layers, where it was asked for.
        errors: For each candidate group (first layer, number of layers) the measured divergence of the
            output, in nats.
    """

    plan: MergePlan
    similarity: LayerSimilarity | None = None
    errors: dict[tuple[int, int], float] = field(default_factory=dict)


def choose_groups(
    walk: LayerWalk,
    tokens: torch.Tensor,
    section: MergeSection,
    seed: int,
    dtype: torch.dtype,
    progress: Progress,
) -> Choice:
    """Decides which layers become one, with which weights.

    Args:
        walk: Over the source.
        tokens: Calibration token ids, shape (samples, length).
        section: The recipe's merge section.
        seed: Chooses token positions.
        dtype: Of the merged layers.
        progress: Told of every layer.

    Raises:
        UsageError: If the number of layers does not allow it.
    """
    removed = layers_to_remove(section, walk.num_layers)
    similarity, errors = None, {}
    average = section.fuse == "average"
    if section.order != "measured" or (average and section.coefficient in ("similarity", "sigmoid")):
        assert section.manifold is not None
        similarity = compare_layers(walk, tokens, section.manifold, seed, progress)
    if section.order != "measured":
        assert similarity is not None
        plan = plan_merge(section, similarity.matrix)
        if not (average and section.coefficient == "measured"):
            return Choice(plan, similarity)
        groups = plan.groups
    else:
        fixed = section.coefficient if isinstance(section.coefficient, float) else None
        build = by_average(walk, fixed) if average else by_channels(walk, dtype)
        candidates = candidate_groups(section, walk.num_layers, removed)
        errors = measure_groups(walk, tokens, seed, candidates, build, progress)
        groups = walk.ranks.tell(cheapest_groups(errors, walk.num_layers, removed))
    coefficients = {}
    if average and section.coefficient == "measured":
        samples = learning_samples(walk.ranks, tokens, seed)
        coefficients = _measure_coefficients(walk, samples, groups, progress)
    matrix = None if similarity is None else similarity.matrix
    return Choice(chain_plan(groups, section, matrix, coefficients), similarity, errors)


def candidate_groups(section: MergeSection, num_layers: int, removed: int) -> list[tuple[int, int]]:
    """First layer and length of every group of neighbours that may become one layer."""
    first, end = section.protect.first, num_layers - section.protect.last
    longest = longest_group(end - first, removed)
    return [
        (start, length)
        for start in range(first, end)
        for length in range(2, longest + 1)
        if start + length <= end
    ]


def _measure_coefficients(
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
