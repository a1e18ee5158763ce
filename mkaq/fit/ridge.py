"""Ridge regression from accumulated moments, and the choice of columns: pure linear algebra.

A weight W that maps features z (the channels of a layer) to a target r is the minimum of
sum_t w_t |r_t - W z_t|^2 + ridge * mean(diag G) * |W - W0|^2, W0 the weight that it had. Only the
moments G = sum w z z^T, B = sum w z r^T and sum w |r|^2 are kept, so that any number of tokens fits
into memory and the error of any W on held-out tokens is known without seeing them again.
"""

from dataclasses import dataclass

import torch

from mkaq.fit.gram import add_gram, factorize, mirror, solve_positive

RIDGES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0)
NOTHING = 1e-9


class Moments:
    """The moments of a weighted regression, float64 sums of float32 products.

    Args:
        features: Number of features.
        targets: Number of targets.
        device: Where the moments are.

    Attributes:
        cross: sum w z r^T, shape (features, targets).
        energy: sum w |r|^2.
    """

    def __init__(self, features: int, targets: int, device: torch.device) -> None:
        self._gram = torch.zeros(features, features, dtype=torch.float64, device=device)
        self._half = False  # whether only the upper half of it is up to date
        self.cross = torch.zeros(features, targets, dtype=torch.float64, device=device)
        self.energy = 0.0

    def add(self, features: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> None:
        """Adds rows.

        Args:
            features: Shape (rows, features).
            targets: Shape (rows, targets).
            weights: Of the rows, shape (rows,).
        """
        root = weights.sqrt().unsqueeze(1)
        z, r = features.float() * root, targets.float() * root
        self.cross += z.T @ r
        self.energy += float(r.double().square().sum())
        add_gram(self._gram, z)
        self._half = True

    @property
    def gram(self) -> torch.Tensor:
        """sum w z z^T, shape (features, features)."""
        if self._half:
            mirror(self._gram)
            self._half = False
        return self._gram

    def select(self, columns: torch.Tensor) -> "Moments":
        """The moments of some of the features."""
        chosen = Moments(0, 0, self.gram.device)
        chosen._gram, chosen.cross = self.gram[columns][:, columns], self.cross[columns]
        chosen.energy = self.energy
        return chosen

    def error(self, weight: torch.Tensor) -> float:
        """sum w |r - W z|^2 / sum w |r|^2 of a weight of shape (targets, features)."""
        if not self.energy > 0:
            return 0.0
        w = weight.double()
        left = ((w @ self.gram) * w).sum() - 2 * (w * self.cross.T).sum()
        return max(0.0, 1 + float(left) / self.energy)


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
    factor = _factor(moments.gram, ridge)
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


def keep_columns(moments: Moments, keep: int, ridge: float, group: int = 1) -> torch.Tensor:
    """The columns that together explain the target best, by backward elimination.

    Of the regression on all columns, those are removed whose removal costs least, given that the
    others take over what they can: w_j P_jj^-1 w_j^T for a block j of columns, P the inverse of the
    Gram matrix (optimal brain surgeon; Hassibi and Stork 1993, eq. 5). The weights and P of the rest
    are updated after each step, in which at most a 40th of what must go is removed at once.

    Args:
        moments: Of the regression on all columns.
        keep: Number of blocks to keep.
        ridge: As a share of the mean of the Gram matrix's diagonal.
        group: Columns of a block; blocks are neighbouring columns.

    Returns:
        The kept blocks' numbers, rising, shape (keep,).
    """
    factor = _factor(moments.gram, ridge)
    if factor is None:
        raise ArithmeticError("the damped Gram matrix is not positive definite")
    inverse = torch.cholesky_inverse(factor, out=factor)
    weight = inverse @ moments.cross
    count = len(inverse) // group
    alive = torch.ones(count, dtype=torch.bool, device=inverse.device)
    at_once = max(1, (count - keep) // 40)
    while (surplus := int(alive.sum()) - keep) > 0:
        left = alive.nonzero()[:, 0]
        columns = columns_of(left, group).reshape(len(left), group)
        blocks = inverse[columns[:, :, None], columns[:, None, :]]
        own = weight[columns]
        cost = (own * (own / blocks if group == 1 else solve_positive(blocks, own))).sum((1, 2))
        go = left[cost.topk(min(at_once, surplus), largest=False).indices]
        index = columns_of(go, group)
        stripe = inverse[:, index]
        update = solve_positive(stripe[index], stripe.T)
        weight.addmm_(update.T, weight[index], alpha=-1)
        inverse.addmm_(stripe, update, alpha=-1)
        inverse[index], inverse[:, index], weight[index] = 0.0, 0.0, 0.0
        inverse[index, index] = 1.0
        alive[go] = False
    return alive.nonzero()[:, 0]


def columns_of(blocks: torch.Tensor, group: int) -> torch.Tensor:
    """The columns of blocks of `group` neighbouring columns, shape (blocks * group,)."""
    return (blocks[:, None] * group + torch.arange(group, device=blocks.device)).reshape(-1)


def column_sizes(features: torch.Tensor, weights: torch.Tensor, writer: torch.Tensor) -> torch.Tensor:
    """What each column writes by itself: the weighted sum of |w_j z_j|^2 over tokens.

    Args:
        features: z, shape (tokens, columns).
        weights: Of the tokens, shape (tokens,).
        writer: w, shape (targets, columns).

    Returns:
        Shape (columns,), float32.
    """
    energy = weights.float() @ features.float().square()
    return energy * writer.to(energy.device).float().square().sum(0)


def _factor(gram: torch.Tensor, ridge: float) -> torch.Tensor | None:
    """The lower Cholesky factor of a damped Gram matrix; None if there is none."""
    damped = gram.clone()
    damped.diagonal().add_(ridge * gram.diagonal().mean().clamp(min=1e-30))
    return factorize(damped)
