"""One process of a group; every one but the first would choose otherwise in whatever is chosen.

usage: torchrun ... -m tests.choices_worker ARGUMENTS of mkaq
"""

import os
from dataclasses import replace
from typing import Any

import torch

from mkaq.cli import main
from mkaq.fit import targets
from mkaq.merge import choose, solve
from mkaq.recover import layerwise


def contrary() -> None:
    """Replaces what chooses by what chooses something else."""
    keep, fit, cut, error = solve.keep_columns, targets.fit, choose.cheapest_groups, layerwise.layer_error

    def other_columns(moments: Any, count: int, ridge: float, group: int = 1) -> torch.Tensor:
        total = len(keep(moments, count, ridge, group))
        return torch.arange(total)

    def other_groups(costs: Any, layers: int, removed: int) -> list[list[int]]:
        return cut({group: -cost for group, cost in costs.items()}, layers, removed)

    solve.keep_columns = other_columns
    targets.fit = lambda *a: replace(fit(*a), ridge=None, weight=fit(*a).weight * 0.5)
    choose.cheapest_groups = other_groups
    layerwise.layer_error = lambda *a: -error(*a)


if __name__ == "__main__":
    if int(os.environ["RANK"]) > 0:
        contrary()
    main()
