"""The choice of columns: which channels of a layer together explain what it should write."""

import torch

from mkaq.fit.gram import solve_positive
from mkaq.fit.moments import Moments, damped_factor


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
    factor = damped_factor(moments.gram, ridge)
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
