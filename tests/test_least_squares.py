"""Ridge regression from moments against direct products and lstsq; which columns are kept."""

import itertools

import pytest
import torch

from mkaq.fit.moments import Moments
from mkaq.fit.ridge import RIDGES, fit, solve_ridges
from mkaq.fit.select import column_sizes, columns_of, keep_columns

NEARLY_BEST = 0.95
CPU = torch.device("cpu")
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def rows(features: int, targets: int, count: int, seed: int = 0) -> Rows:
    """Correlated features of different sizes, targets and weights."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(features) + torch.randn(features, features, generator=generator) / features**0.5
    z = torch.randn(count, features, generator=generator) @ mix
    r = torch.randn(count, targets, generator=generator)
    return z, r, torch.rand(count, generator=generator) + 0.1


def moments_of(z: torch.Tensor, r: torch.Tensor, weights: torch.Tensor | None = None) -> Moments:
    moments = Moments(z.shape[1], r.shape[1], CPU)
    moments.add(z, r, torch.ones(len(z)) if weights is None else weights)
    return moments


@pytest.mark.parametrize("features", [5, 512, 1100])  # narrower than a stripe, one, and two and a bit
def test_moments_are_the_direct_products_of_all_batches(features: int) -> None:
    z, r, weights = rows(features, 3, 60)
    moments = Moments(features, 3, CPU)
    for start, end in ((0, 7), (7, 40), (40, 60)):
        moments.add(z[start:end], r[start:end], weights[start:end])
    wide, target, share = z.double(), r.double(), weights.double()
    assert torch.allclose(moments.gram.double(), (wide.T * share) @ wide, atol=1e-3, rtol=1e-5)
    assert torch.allclose(moments.cross.double(), (wide.T * share) @ target, atol=1e-3, rtol=1e-5)
    assert moments.energy == pytest.approx(float((target.square().sum(1) * share).sum()))
    assert moments.gram.dtype == moments.cross.dtype == torch.float32


def test_selected_moments_are_those_of_the_selected_columns() -> None:
    z, r, weights = rows(9, 2, 40)
    columns = torch.tensor([7, 0, 3])
    chosen, direct = moments_of(z, r, weights).select(columns), moments_of(z[:, columns], r, weights)
    assert torch.allclose(chosen.gram, direct.gram, rtol=1e-5)
    assert torch.allclose(chosen.cross, direct.cross, rtol=1e-4, atol=1e-4)
    assert chosen.energy == direct.energy


def test_error_is_the_weighted_residual() -> None:
    z, r, weights = rows(6, 3, 50)
    weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(5))
    left = ((r - z @ weight.T).square().sum(1) * weights).sum() / (r.square().sum(1) * weights).sum()
    moments = moments_of(z, r, weights)
    assert moments.error(weight) == pytest.approx(float(left), rel=1e-5)
    assert moments.error(torch.zeros(3, 6)) == 1
    assert moments_of(z, torch.zeros(50, 3)).error(weight) == 0  # no energy: nothing to miss
    exact = torch.tensor([[1.0, 2.0]])
    assert 0 <= moments_of(z[:, :2], z[:, :2] @ exact.T).error(exact) < 1e-6
    rounded = Moments(1, 1, CPU)  # rounding can make the sums give slightly less than nothing
    rounded.gram.fill_(1), rounded.cross.fill_(1)
    rounded.energy = 0.9999
    assert rounded.error(torch.ones(1, 1)) == 0


@pytest.mark.parametrize("ridge", [1e-3, 0.3, 10.0])
def test_ridge_is_least_squares_of_the_augmented_system(ridge: float) -> None:
    z, r, weights = (x.double() for x in rows(12, 4, 30))
    prior = torch.randn(4, 12, generator=torch.Generator().manual_seed(2)).double()
    damp = ridge * (z.square().sum(1) * weights).sum() / 12
    root = weights.sqrt()[:, None]
    system = torch.cat([z * root, damp.sqrt() * torch.eye(12)])
    goal = torch.cat([r * root, damp.sqrt() * prior.T])
    expected = torch.linalg.lstsq(system, goal).solution.T
    (solved,) = solve_ridges(moments_of(z, r, weights), prior, [ridge])
    assert solved is not None and solved.shape == (4, 12)
    assert torch.allclose(solved.double(), expected, atol=1e-4)


def test_ridge_that_is_not_positive_definite_has_no_solution() -> None:
    moments = Moments(2, 1, CPU)
    moments.gram.copy_(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    small, large = solve_ridges(moments, torch.zeros(1, 2), [1e-3, 3.0])
    assert small is None and large is not None


def test_exact_linear_target_is_recovered() -> None:
    z = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    true = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    learn, held = moments_of(z[:300], z[:300] @ true.T), moments_of(z[300:], z[300:] @ true.T)
    near = true + 0.1 * torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    solved = fit(learn, held, near, NEARLY_BEST)
    assert solved.ridge is not None and solved.weight.dtype == torch.float32
    assert solved.error <= (1 - NEARLY_BEST * 0.99) * solved.error_before
    assert solved.error_before == pytest.approx(held.error(near))
    assert solved.error == pytest.approx(held.error(solved.weight), abs=1e-6)
    (exact,) = solve_ridges(learn, torch.zeros(3, 8), [1e-6])
    assert exact is not None and torch.allclose(exact.float(), true, atol=1e-4)


def test_noise_leaves_the_weight_as_it_was() -> None:
    z, noise, _ = rows(40, 3, 60)
    fresh, other, _ = rows(40, 3, 60, seed=1)
    prior = torch.zeros(3, 40)
    solved = fit(moments_of(z, noise), moments_of(fresh, other), prior, NEARLY_BEST)
    assert solved.ridge is None and torch.equal(solved.weight, prior)
    assert solved.error == solved.error_before == 1


@pytest.mark.parametrize("noise", [0.1, 1.0, 4.0])
def test_the_largest_ridge_that_keeps_the_gain_is_taken(noise: float) -> None:
    z, spread, _ = rows(20, 3, 400)
    true = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    r = z @ true.T + noise * spread
    learn, held, prior = moments_of(z[:100], r[:100]), moments_of(z[100:], r[100:]), torch.zeros(3, 20)
    errors = {}
    for ridge, solved in zip(RIDGES, solve_ridges(learn, prior, RIDGES), strict=True):
        assert solved is not None
        errors[ridge] = held.error(solved)
    gain = held.error(prior) - min(errors.values())
    enough = [ridge for ridge in RIDGES if held.error(prior) - errors[ridge] >= 0.95 * gain]
    chosen = fit(learn, held, prior, NEARLY_BEST)
    assert chosen.ridge == max(enough) > min(enough)
    assert chosen.error == errors[max(enough)] and max(enough) < max(RIDGES)


def refit_cost(moments: Moments, columns: list[int], damp: float) -> float:
    """What the damped regression on some columns leaves, less the target's energy."""
    index = torch.tensor(columns)
    gram = moments.gram[index][:, index].double() + damp * torch.eye(len(index))
    cross = moments.cross[index].double()
    return -float((cross * torch.linalg.solve(gram, cross)).sum())


def by_refits(moments: Moments, keep: int, ridge: float, group: int) -> list[int]:
    """Backward elimination with a new regression for every block that could go."""
    damp = ridge * float(moments.gram.diagonal().mean())
    left = list(range(len(moments.gram) // group))
    while len(left) > keep:
        costs = {}
        for block in left:
            rest = [b * group + i for b in left if b != block for i in range(group)]
            costs[block] = refit_cost(moments, rest, damp)
        left.remove(min(left, key=costs.__getitem__))
    return left


@pytest.mark.parametrize(("seed", "group"), list(itertools.product(range(4), [1, 2, 3])))
def test_elimination_equals_exact_refits(seed: int, group: int) -> None:
    z, r, weights = rows(8 * group, 3, 40, seed)
    moments = moments_of(z, r, weights)
    for keep in (1, 3, 7):
        kept = keep_columns(moments, keep, 1e-2, group)
        assert kept.tolist() == by_refits(moments, keep, 1e-2, group)


def test_useful_columns_stay() -> None:
    z, _, _ = rows(131, 1, 400)
    useful = [3, 17, 90, 128]
    r = z[:, useful] @ torch.tensor([[1.0, -2.0], [2.0, 1.0], [1.5, 0.5], [-1.0, 1.0]])
    moments = moments_of(z, r)
    assert keep_columns(moments, 4, 1e-3).tolist() == useful  # several columns go at once here
    assert keep_columns(moments, 131, 1e-3).tolist() == list(range(131))


def test_columns_of_a_block_stay_together() -> None:
    z, _, _ = rows(20, 1, 200)
    r = z[:, [4, 13]] * 3 + 0.3 * z[:, [5, 12]]  # in blocks 1 and 3 of four columns
    assert keep_columns(moments_of(z, r), 2, 1e-3, group=4).tolist() == [1, 3]


def test_one_of_two_equal_columns_goes() -> None:
    """Each column of the pair explains more than any other, yet one is enough."""
    z = torch.randn(500, 5, generator=torch.Generator().manual_seed(0))
    z[:, 3] = z[:, 1]
    r = z @ torch.tensor([[0.5], [5.0], [0.5], [5.0], [0.5]])
    assert set(keep_columns(moments_of(z, r), 4, 1e-4).tolist()) in ({0, 1, 2, 4}, {0, 2, 3, 4})


def test_columns_of_blocks() -> None:
    assert columns_of(torch.tensor([2, 0]), 3).tolist() == [6, 7, 8, 0, 1, 2]
    assert columns_of(torch.tensor([2, 0]), 1).tolist() == [2, 0]


def test_size_of_a_column_is_the_energy_of_what_it_writes() -> None:
    z, _, weights = rows(7, 1, 60)
    writer = torch.randn(4, 7, generator=torch.Generator().manual_seed(3))
    sizes = column_sizes(z, weights, writer)
    for column in range(7):
        written = torch.outer(z[:, column], writer[:, column])
        assert float(sizes[column]) == pytest.approx(
            float((written.square().sum(1) * weights).sum()), rel=1e-4
        )
