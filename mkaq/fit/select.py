"""Column selection: the channels of a layer that together best explain what it should write."""

import torch

from mkaq.fit.gram import inverse_of, solve_positive
from mkaq.fit.moments import Moments, damped_factor


def keep_columns(moments: Moments, keep: int, ridge: float, group: int = 1) -> torch.Tensor:
    """The blocks of columns that together explain the target best, by backward elimination.

    Starting from the regression on all columns, the blocks with the lowest removal cost are removed. The cost
    of block j is w_j P_jj^-1 w_j^T, P the inverse of the Gram matrix: the increase of the error after the
    other columns have adapted (optimal brain surgeon; Hassibi and Stork 1993, eq. 5). Each step removes at
    most a 40th of the blocks to be removed, then updates the weights and P of the rest.

    Args:
        moments: The moments of the regression on all columns.
        keep: The number of blocks to keep.
        ridge: As a fraction of the mean of the Gram matrix's diagonal.
        group: Columns per block; the columns of a block are neighbours.

    Returns:
        The indices of the kept blocks, ascending, shape (keep,).
    """
    factor = damped_factor(moments.gram, ridge)
    if factor is None:
        raise ArithmeticError("the damped Gram matrix is not positive definite")
    weight = torch.cholesky_solve(moments.cross, factor)
    inverse = inverse_of(factor)
    count = len(inverse) // group
    alive = torch.ones(count, dtype=torch.bool, device=inverse.device)
    at_once = max(1, (count - keep) // 40)
    while (surplus := int(alive.sum()) - keep) > 0:
        remaining = alive.nonzero()[:, 0]
        columns = columns_of(remaining, group).reshape(len(remaining), group)
        blocks = inverse[columns[:, :, None], columns[:, None, :]]
        own = weight[columns]
        cost = (own * (own / blocks if group == 1 else solve_positive(blocks, own))).sum((1, 2))
        removed = remaining[cost.topk(min(at_once, surplus), largest=False).indices]
        index = columns_of(removed, group)
        stripe = inverse[:, index]
        update = solve_positive(stripe[index], stripe.T)
        weight.addmm_(update.T, weight[index], alpha=-1)
        inverse.addmm_(stripe, update, alpha=-1)
        inverse[index], inverse[:, index], weight[index] = 0.0, 0.0, 0.0
        inverse[index, index] = 1.0
        alive[removed] = False
    return alive.nonzero()[:, 0]


def columns_of(blocks: torch.Tensor, group: int) -> torch.Tensor:
    """The columns of blocks of `group` neighbouring columns, shape (blocks * group,)."""
    return (blocks[:, None] * group + torch.arange(group, device=blocks.device)).reshape(-1)


def column_sizes(features: torch.Tensor, weights: torch.Tensor, writer: torch.Tensor) -> torch.Tensor:
    """The energy that each column writes by itself: sum_t weight_t |w_j z_tj|^2.

    Args:
        features: z, shape (tokens, columns).
        weights: Weights of the tokens, shape (tokens,).
        writer: w, shape (targets, columns).

    Returns:
        Shape (columns,), float32.
    """
    energy = weights.float() @ features.float().square()
    return energy * writer.to(energy.device).float().square().sum(0)
