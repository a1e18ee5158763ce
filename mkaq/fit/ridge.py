"""Ridge regression from moments toward the previous weight; held-out tokens choose the ridge."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mkaq.fit.moments import Moments, damped_factor

RIDGES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0)
TARGETS = 1024  # targets that decide on the ridge; each one costs part of a solution
NOTHING = 1e-6  # of the energy: what float32 cannot tell from rounding


@dataclass(frozen=True)
class Outcome:
    """How well a weight was solved. Errors are fractions of the target's energy on held-out tokens.

    Attributes:
        ridge: As a fraction of the mean feature energy; None if the weight was left unchanged.
        error_before: The error of the previous weight.
        error: The error of the weight.
    """

    ridge: float | None
    error_before: float
    error: float


@dataclass(frozen=True)
class Fit(Outcome):
    """A solved weight.

    Attributes:
        weight: Shape (targets, features), float32.
    """

    weight: torch.Tensor


def solve_ridges(
    moments: Moments, prior: torch.Tensor, ridges: Sequence[float]
) -> Iterator[torch.Tensor | None]:
    """W = W0 + (B - G W0^T)^T (G + ridge * mean(diag G) * I)^-1, with the moments of `moments`.

    Args:
        moments: The moments of the regression.
        prior: W0, shape (targets, features).
        ridges: Each as a fraction of the mean of the Gram matrix's diagonal.

    Yields:
        For every ridge, shape (targets, features), float32; None where the damped Gram matrix is not positive
        definite.
    """
    w0 = prior.float()
    missed = torch.addmm(moments.cross, moments.gram, w0.T, alpha=-1)

    def solve(ridge: float) -> torch.Tensor | None:
        factor = damped_factor(moments.gram, ridge)  # one factor in memory at a time
        return None if factor is None else w0 + torch.cholesky_solve(missed, factor).T

    yield from map(solve, ridges)


def fit(moments: Moments, held_out: Moments, prior: torch.Tensor, nearly: float) -> Fit:
    """Solves with the largest ridge that is nearly as good as the best, or leaves the weight unchanged.

    A ridge is nearly as good if it keeps the fraction `nearly` of the best gain on held-out tokens. Held-out
    tokens come from the calibration's domain; for other text, among weights of similar gain the one that
    moved less is better (compare the one-standard-error rule of Breiman et al., Classification and Regression
    Trees, 1984, section 3.4.3). Of more than `TARGETS` targets, a part decides.

    Args:
        moments: The moments of the tokens to learn from.
        held_out: The moments of held-out tokens.
        prior: The previous weight, shape (targets, features).
        nearly: From 0 to 1.
    """
    step = -(-len(prior) // TARGETS)
    some, seen, first = moments.every(step), held_out.every(step), prior[::step]
    before, changes = seen.change(first), dict[float, float]()
    for ridge, weight in zip(RIDGES, solve_ridges(some, first, RIDGES), strict=True):  # one weight at a time
        if weight is not None:
            changes[ridge] = seen.change(weight)
    error = held_out.error(prior)
    gain = before - min(changes.values(), default=before)
    if gain <= NOTHING * held_out.energy / step or not held_out.energy > 0:
        return Fit(None, error, error, prior.float())
    ridge = max(ridge for ridge, change in changes.items() if before - change >= nearly * gain)
    (weight,) = solve_ridges(moments, prior, [ridge])
    assert weight is not None
    return Fit(ridge, error, held_out.error(weight), weight.float())
