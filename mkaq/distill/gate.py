"""How long the steps of a distillation are, when it stops, and which of its weights are kept.

Text of one domain can be learned at the cost of every other one: both are measured on held-out tokens, and
what makes either worse than it was is not kept.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

MUCH = 0.15  # nats per token that a model has lost which takes the whole learning rate
NOTHING = 1e-6  # nats per token: what rounding leaves of a model that has lost nothing
PATIENCE = 6  # measurements in a row that were no better on the text that is learned


class Check(NamedTuple):
    """A measurement on held-out tokens: KL(source || model) in nats per token.

    Attributes:
        step: After how many steps.
        loss: The mean loss of the steps since the last measurement; None before the first step.
        own: On the text that is learned.
        other: On other text.
    """

    step: int
    loss: float | None
    own: float
    other: float


def best_check(checks: Sequence[Check]) -> int:
    """The number of the measurement whose weights are kept: 0 if no later one is better on both texts.

    Of those that are, the one with the lowest mean ratio to the first.
    """
    first = checks[0]
    allowed = [n for n, check in enumerate(checks) if check.own <= first.own and check.other <= first.other]
    return min(allowed, key=lambda number: _score(checks[number], first), default=0)


def length_of_steps(checks: Sequence[Check], *, eased: bool) -> float:
    """The share of the learning rate that is used.

    Steps that are too long make a model worse that has lost little, and shorter ones mend that. So each
    measurement that is worse than the best before it halves the rate, on held-out text of the kind that is
    learned; and if it is `eased`, a model whose first divergence is below `MUCH` starts with less.
    """
    lowest, share = math.inf, min(1.0, checks[0].own / MUCH) if eased else 1.0
    for check in checks:
        share *= 0.5 if check.own > lowest else 1.0
        lowest = min(lowest, check.own)
    return share


def is_over(checks: Sequence[Check]) -> bool:
    """Whether there is nothing to learn, or no more: held-out text of the same kind was best long ago.

    Other text does not end it: it often gets worse at first and better than before at the end, when steps
    are short.
    """
    lowest = min(range(len(checks)), key=lambda number: checks[number].own)
    return checks[0].own < NOTHING or len(checks) - 1 - lowest >= PATIENCE


def ending(checks: Sequence[Check]) -> str:
    """Why a distillation ended before its last step."""
    if checks[0].own < NOTHING:
        return "nothing was lost"
    return "nothing was better any more" if is_over(checks) else "what came next was not finite"


def _score(check: Check, first: Check) -> float:
    pairs = (check.own, first.own), (check.other, first.other)
    return sum(now / before if before else 1.0 for now, before in pairs)
