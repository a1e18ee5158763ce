"""Ridge regression from moments, toward the weight as it was; the ridge by what held-out tokens say."""

from dataclasses import dataclass

import torch

from mkaq.fit.moments import Moments, damped_factor

RIDGES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0)
NOTHING = 1e-9


@dataclass(frozen=True)
class Fit:
    """A solved weight.

    Attributes:
        weight: Shape (targets, features), float32.
        ridge: As a share of the mean feature energy; None if the weight was left as it was.
        error: On the held-out tokens, as a share of the target's energy.
        error_before: The same of the weight as it was.
    """

    weight: torch.Tensor
    ridge: float | None
    error: float
    error_before: float


def solve_ridge(moments: Moments, prior: torch.Tensor, ridge: float) -> torch.Tensor | None:
    """The regularized least squares weight.

    Args:
        moments: Of the regression.
        prior: W0, shape (targets, features).
        ridge: As a share of the mean of the Gram matrix's diagonal.

    Returns:
        Shape (targets, features), float64; None if the damped Gram matrix is not positive definite.
    """
    w0 = prior.double()
    factor = damped_factor(moments.gram, ridge)
    if factor is None:
        return None
    return w0 + torch.cholesky_solve(moments.cross - moments.gram @ w0.T, factor).T


def fit(moments: Moments, held_out: Moments, prior: torch.Tensor, nearly: float) -> Fit:
    """Solves with the largest ridge that is nearly as good as the best, or leaves the weight as it is.

    How good is measured on held-out tokens: a ridge is nearly as good if it keeps a share `nearly`
    of what the best one gains. Those tokens are of the calibration's domain. Text of another one is served
    better by a weight that moved less for the same gain (compare the one-standard-error rule of
    Breiman et al., Classification and Regression Trees, 1984, section 3.4.3).

    Args:
        moments: Of the tokens to learn from.
        held_out: Of others.
        prior: The weight as it was, shape (targets, features).
        nearly: From 0 to 1.
    """
    before = held_out.error(prior)
    errors: dict[float, float] = {}
    for ridge in RIDGES:  # one weight in memory at a time
        weight = solve_ridge(moments, prior, ridge)
        if weight is not None:
            errors[ridge] = held_out.error(weight)
    gain = before - min(errors.values(), default=before)
    if gain <= NOTHING:
        return Fit(prior.float(), None, before, before)
    ridge = max(ridge for ridge, error in errors.items() if before - error >= nearly * gain)
    weight = solve_ridge(moments, prior, ridge)
    assert weight is not None
    return Fit(weight.float(), ridge, errors[ridge], before)
