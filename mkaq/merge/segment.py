"""Which neighbouring layers become one: the cheapest cut of a model into groups."""

import math
from collections.abc import Mapping, Sequence


def longest_group(free: int, removed: int) -> int:
    """Layers of the longest group worth measuring: one more than evenly cut groups would need.

    Args:
        free: Layers that may be merged.
        removed: How many of them go.
    """
    return min(free, math.ceil(free / (free - removed)) + 1)


def candidate_groups(num_layers: int, protect: tuple[int, int], removed: int) -> list[tuple[int, int]]:
    """First layer and length of every group of neighbours that may become one layer.

    Args:
        num_layers: Of the model.
        protect: Layers that stay at the start and at the end.
        removed: How many layers go.
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
    """The cut of layers 0..num_layers-1 into num_layers - removed groups with the least total cost.

    Dynamic programming over the last layer and the number of groups, O(num_layers^2 * group length).

    Args:
        costs: For a group (first layer, number of layers) of at least two what it costs; a lone layer
            costs nothing, and a group that is not listed is not allowed.
        num_layers: Layers of the model.
        removed: How many have to go.

    Raises:
        ValueError: If no cut with the allowed groups removes so many.
    """
    longest = max((length for _, length in costs), default=1)
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]  # [end][removed] = cost, length of last group
    for end in range(1, num_layers + 1):
        row: dict[int, tuple[float, int]] = {}
        for length in range(1, min(longest, end) + 1):
            price = 0.0 if length == 1 else costs.get((end - length, length), math.inf)
            for gone, (cost, _) in best[end - length].items():
                total, now = cost + price, gone + length - 1
                if now <= removed and total < row.get(now, (math.inf, 0))[0]:
                    row[now] = (total, length)
        best.append(row)
    if removed not in best[num_layers]:
        raise ValueError(f"no cut of {num_layers} layers into the allowed groups removes {removed}")
    groups: list[list[int]] = []
    end, gone = num_layers, removed
    while end:
        length = best[end][gone][1]
        groups.append(list(range(end - length, end)))
        end, gone = end - length, gone - (length - 1)
    return groups[::-1]


def groups_of(removed: Sequence[int], num_layers: int) -> list[list[int]]:
    """Groups in which every removed layer joins the kept one before it, or the first one."""
    gone = set(removed)
    starts = [0, *[index for index in range(num_layers) if index not in gone][1:]]
    return [list(range(a, b)) for a, b in zip(starts, [*starts[1:], num_layers], strict=True)]
