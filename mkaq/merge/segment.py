"""The cheapest partition of a model's layers into groups, each of which becomes one layer."""

import math
from collections.abc import Mapping, Sequence


def longest_group(free: int, removed: int) -> int:
    """The length of the longest group worth measuring: one more than an even partition needs.

    Args:
        free: Number of layers that may be merged.
        removed: Layers to remove.
    """
    return min(free, math.ceil(free / (free - removed)) + 1)


def candidate_groups(num_layers: int, protect: tuple[int, int], removed: int) -> list[tuple[int, int]]:
    """First layer and length of every group of neighbours that may become one layer.

    Args:
        num_layers: Layers of the model.
        protect: Layers left alone at the start and the end.
        removed: Layers to remove.
    """
    first, end = protect[0], num_layers - protect[1]
    longest = longest_group(end - first, removed)
    return [
        (start, length)
        for start in range(first, end)
        for length in range(2, longest + 1)
        if start + length <= end
    ]


def cheapest_groups(costs: Mapping[tuple[int, int], float], num_layers: int, removed: int) -> list[list[int]]:
    """The partition of layers 0..num_layers-1 into num_layers - removed groups with the least total cost.

    Dynamic programming over the last layer and the number of groups, O(num_layers^2 * group length).

    Args:
        costs: Cost of each allowed group (first layer, number of layers) of at least two layers; a single
            layer costs nothing.
        num_layers: Layers of the model.
        removed: Layers to remove.

    Raises:
        ValueError: If no partition into allowed groups removes that many layers.
    """
    longest = max((length for _, length in costs), default=1)
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]  # [end][removed] = cost, length of last group
    for end in range(1, num_layers + 1):
        row: dict[int, tuple[float, int]] = {}
        for length in range(1, min(longest, end) + 1):
            group_cost = 0.0 if length == 1 else costs.get((end - length, length), math.inf)
            for dropped, (cost, _) in best[end - length].items():
                total, count = cost + group_cost, dropped + length - 1
                if count <= removed and total < row.get(count, (math.inf, 0))[0]:
                    row[count] = (total, length)
        best.append(row)
    if removed not in best[num_layers]:
        raise ValueError(f"no cut of {num_layers} layers into the allowed groups removes {removed}")
    groups: list[list[int]] = []
    end, dropped = num_layers, removed
    while end:
        length = best[end][dropped][1]
        groups.append(list(range(end - length, end)))
        end, dropped = end - length, dropped - (length - 1)
    return groups[::-1]


def groups_of(removed: Sequence[int], num_layers: int) -> list[list[int]]:
    """Groups in which every removed layer joins the kept layer before it, or else the first layer."""
    absorbed = set(removed)
    starts = [0, *[index for index in range(num_layers) if index not in absorbed][1:]]
    return [list(range(a, b)) for a, b in zip(starts, [*starts[1:], num_layers], strict=True)]
