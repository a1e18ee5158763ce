"""The GPTQ solver: the codes of the published algorithm, and what it does where that breaks down."""

from typing import Any

import pytest
import torch

from mkaq.quantize.gptq import PLAIN, DampingError, GptqResult, Kernels, find_scales, gptq, reversed_factor
from mkaq.quantize.gptq_cpu import NUMBA

ROWS, COLUMNS, GROUP, DAMP = 16, 160, 32, 0.01


def problem(seed: int = 1, columns: int = COLUMNS, rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the Hessian of correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    sizes = torch.rand(columns, generator=generator) * 3 + 0.1
    inputs = torch.randn(4 * columns, columns, generator=generator) @ (mix + torch.eye(columns)) * sizes
    return weight, inputs.T @ inputs


def rounded(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, g_idx: torch.Tensor, bits: int
) -> torch.Tensor:
    """Codes of rounding to nearest."""
    return ((weight / scales[:, g_idx]).round() + zeros[:, g_idx]).clamp(0, 2**bits - 1)


def published(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    sym: bool,
    desc_act: bool,
    static_groups: bool,
) -> dict[str, torch.Tensor]:
    """Algorithm 1 of GPTQ (arXiv 2210.17323) in float64, column by column, without blocks.

    Row j of the upper Cholesky factor of the inverse Hessian says how the later columns make up
    for the error of column j.
    """
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    importance = hessian.diagonal()
    order = torch.argsort(importance, descending=True, stable=True) if desc_act else torch.arange(columns)
    scales, zeros = torch.zeros(2, rows, columns // size).double()
    for group, part in enumerate(torch.arange(columns).split(size)):  # replaced below if not static
        scales[:, group], zeros[:, group] = find_scales(weight[:, part], importance[part], bits, sym)
    damped = hessian.double() + DAMP * importance.double().mean() * torch.eye(columns)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    work = weight.double()[:, order]
    codes, g_idx = torch.zeros_like(weight), torch.zeros(columns, dtype=torch.long)
    for j, column in enumerate(order.tolist()):
        if not static_groups and j % size == 0:
            ahead, costs = work[:, j : j + size].float(), importance[order[j : j + size]]
            scales[:, j // size], zeros[:, j // size] = find_scales(ahead, costs, bits, sym)
        g_idx[column] = group = column // size if static_groups else j // size
        scale, zero = scales[:, group], zeros[:, group]
        code = ((work[:, j] / scale).round() + zero).clamp(0, 2**bits - 1)
        work[:, j:] -= torch.outer((work[:, j] - (code - zero) * scale) / upper[j, j], upper[j, j:])
        codes[:, column] = code
    return {"codes": codes, "scales": scales, "zeros": zeros, "g_idx": g_idx}


def cost(weight: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """tr((W - Q) H (W - Q)^T), row by row."""
    error = (weight - quantized).double()
    return ((error @ hessian.double()) * error).sum(1)


def damped(hessian: torch.Tensor, share: float) -> torch.Tensor:
    return hessian + share * hessian.diagonal().mean() * torch.eye(len(hessian))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(
    ("desc_act", "static_groups"), [(False, False), (True, False), (False, True), (True, True)]
)
@pytest.mark.parametrize("group_size", [GROUP, -1])
@pytest.mark.parametrize("kernels", [PLAIN, NUMBA], ids=["plain", "compiled"])
def test_codes_are_those_of_the_published_algorithm(
    bits: int, sym: bool, desc_act: bool, static_groups: bool, group_size: int, kernels: Kernels
) -> None:
    weight, hessian = problem()
    options: dict[str, Any] = {"bits": bits, "group_size": group_size, "sym": sym, "desc_act": desc_act}
    expected = published(weight, hessian, static_groups=static_groups, **options)
    settings = options | {"damp_percent": DAMP, "kernels": kernels}
    result = gptq(weight, hessian, static_groups=static_groups, **settings)
    same = torch.stack(
        [(getattr(result, k) == expected[k]).all(1) for k in ("codes", "scales", "zeros")]
    ).all(0)
    assert (
        same.sum() >= ROWS - 3
    )  # a row in which float32 rounds a close call the other way differs from there
    assert torch.equal(result.g_idx, expected["g_idx"])


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(
    ("group_size", "static_groups"), [(16, False), (96, False), (192, False), (32, True)]
)
def test_compiled_loops_give_the_codes_of_the_plain_ones(
    sym: bool, group_size: int, static_groups: bool
) -> None:
    weight, hessian = problem(columns=576, rows=33)
    options: dict[str, Any] = {"bits": 4, "group_size": group_size, "sym": sym, "desc_act": static_groups}
    compiled = gptq(weight, hessian, static_groups=static_groups, **options, kernels=NUMBA)
    plain = gptq(weight, hessian, static_groups=static_groups, **options)
    same = (compiled.codes == plain.codes).float().mean(1)
    assert (same == 1).sum() >= 31 and same.min() > 0.9  # a close call may fall the other way
    assert (compiled.scales == plain.scales).float().mean() > 0.999
    assert torch.allclose(compiled.errors.sum(), plain.errors.sum(), rtol=1e-3)


@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_loops_leave_the_threads_of_torch_alone(threads: int) -> None:
    weight, hessian = problem()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        gptq(weight, hessian, bits=4, group_size=GROUP, kernels=NUMBA)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_scales_below_what_float16_holds_are_rounded_as_torch_does() -> None:
    weight = torch.randn(64, 32) * torch.logspace(-9, 5, 64)[:, None]
    for sym in (True, False):
        for got, expected in zip(
            NUMBA.find_scales(weight, torch.ones(32), 4, sym),
            find_scales(weight, torch.ones(32), 4, sym),
            strict=True,
        ):
            assert torch.equal(got, expected)


def test_identity_hessian_gives_rounding_to_nearest() -> None:
    weight, _ = problem()
    for static_groups in (False, True):
        result = gptq(weight, torch.eye(COLUMNS), bits=4, group_size=GROUP, static_groups=static_groups)
        scales, zeros = find_scales(weight.reshape(ROWS, -1, GROUP), torch.ones(GROUP), 4, sym=True)
        g_idx = torch.arange(COLUMNS) // GROUP
        assert torch.equal(result.scales, scales) and torch.equal(result.zeros, zeros)
        assert torch.equal(result.codes, rounded(weight, scales, zeros, g_idx, 4).to(torch.uint8))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_better_than_rounding_to_nearest_where_it_counts(bits: int) -> None:
    weight, hessian = problem()
    result = gptq(weight, hessian, bits=bits, group_size=GROUP, static_groups=True)
    nearest = rounded(weight, result.scales, result.zeros, result.g_idx, bits)
    plain = (nearest - result.zeros[:, result.g_idx]) * result.scales[:, result.g_idx]
    assert cost(weight, result.weight, hessian).sum() < 0.8 * cost(weight, plain, hessian).sum()
    assert (weight - result.weight).square().sum() > (weight - plain).square().sum()


@pytest.mark.parametrize("side", [3, -3])
def test_asymmetric_codes_fit_one_sided_weights(side: float) -> None:
    weight, hessian = problem()
    weight += side
    quantized = [gptq(weight, hessian, bits=4, group_size=GROUP, sym=sym).weight for sym in (True, False)]
    symmetric, asymmetric = (cost(weight, q, hessian).sum() for q in quantized)
    assert asymmetric < 0.5 * symmetric


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("static_groups", [False, True])
def test_groups_are_where_the_format_wants_them(desc_act: bool, static_groups: bool) -> None:
    weight, hessian = problem()
    order = torch.argsort(hessian.diagonal(), descending=True)
    g_idx = gptq(
        weight, hessian, bits=4, group_size=GROUP, desc_act=desc_act, static_groups=static_groups
    ).g_idx
    in_solving_order = g_idx[order] if desc_act and not static_groups else g_idx
    assert torch.equal(in_solving_order, torch.arange(COLUMNS) // GROUP)


@pytest.mark.parametrize("sym", [True, False])
def test_stacked_rows_solve_as_separate_ones(sym: bool) -> None:
    weight, hessian = problem()
    options: dict[str, Any] = {"bits": 4, "group_size": GROUP, "sym": sym, "desc_act": True}
    together = gptq(weight, hessian, **options)
    parts = [gptq(part, hessian, **options) for part in weight.split((6, ROWS - 6))]
    for name in ("codes", "scales", "zeros", "weight"):
        assert torch.equal(getattr(together, name), torch.cat([getattr(part, name) for part in parts])), name
    assert torch.allclose(together.errors, torch.cat([part.errors for part in parts]), rtol=1e-4)


@pytest.mark.parametrize("static_groups", [False, True])
def test_reported_error_and_energy_are_those_of_the_hessian_as_it_is(static_groups: bool) -> None:
    weight, hessian = problem()
    hessian[5], hessian[:, 5] = 0, 0  # an input that is always 0
    result = gptq(
        weight,
        hessian,
        bits=3,
        group_size=GROUP,
        static_groups=static_groups,
        damp_percent=0.05,
        desc_act=True,
    )
    expected = cost(weight, result.weight, hessian)
    assert result.errors.shape == (ROWS,)
    assert torch.allclose(result.errors.double(), expected, rtol=1e-3)
    energies = cost(weight, torch.zeros_like(weight), hessian)
    assert torch.allclose(result.energies.double(), energies, rtol=1e-2)
    assert float(result.energies.double().sum() / energies.sum()) == pytest.approx(1, rel=2e-3)


def test_factor_is_upper_and_its_product_is_the_damped_hessian() -> None:
    _, hessian = problem()
    reverse, used = reversed_factor(hessian, 0.02)
    factor = reverse.flip(0, 1)
    assert used == 0.02 and torch.equal(factor, factor.triu())
    assert torch.allclose(factor @ factor.T, damped(hessian, 0.02), atol=1e-5 * float(hessian.abs().max()))


def test_singular_hessian_raises_the_damping_and_records_it() -> None:
    weight, _ = problem()
    pairs = torch.block_diag(*[torch.tensor([[1, 1.05], [1.05, 1]])] * (COLUMNS // 2))  # needs 5 %
    assert gptq(weight, pairs, bits=4, group_size=GROUP).damp_percent == pytest.approx(0.1)
    assert gptq(weight, pairs, bits=4, group_size=GROUP, damp_percent=0.06).damp_percent == 0.06
    result = gptq(weight, torch.ones(COLUMNS, COLUMNS), bits=4, group_size=GROUP, damp_percent=1e-12)
    assert 1e-12 < result.damp_percent < 1e-2
    assert result.weight.isfinite().all()


@pytest.mark.parametrize("case", ["nan", "inf", "indefinite"])
def test_hopeless_hessian_is_refused(case: str) -> None:
    weight, hessian = problem(columns=GROUP)
    hessian[3, 3] = {"nan": torch.nan, "inf": torch.inf, "indefinite": 1.0}[case]
    if case == "indefinite":
        hessian[3, 4] = hessian[4, 3] = 1e6
    with pytest.raises(DampingError, match="100%"):
        gptq(weight, hessian, bits=4, group_size=GROUP)


def test_inputs_that_are_always_zero_are_rounded_to_nearest() -> None:
    weight, hessian = problem()
    dead = torch.arange(GROUP)  # a whole group
    hessian[dead] = hessian[:, dead] = 0
    result = gptq(weight, hessian, bits=4, group_size=GROUP)
    scales, _ = find_scales(weight[:, dead], torch.ones(GROUP), 4, sym=True)
    assert torch.equal(result.scales[:, 0], scales)
    nearest = rounded(weight, result.scales, result.zeros, result.g_idx, 4)
    assert torch.equal(result.codes[:, dead], nearest[:, dead].to(torch.uint8))
    assert not torch.equal(result.codes, nearest.to(torch.uint8))
    nothing = gptq(weight, torch.zeros_like(hessian), bits=4, group_size=GROUP)
    assert torch.equal(nothing.codes, rounded(weight, nothing.scales, nothing.zeros, nothing.g_idx, 4))


def test_group_size_that_does_not_divide_raises() -> None:
    weight, hessian = problem()
    with pytest.raises(ValueError, match="64 does not divide 160"):
        gptq(weight, hessian, bits=4, group_size=64)


def test_arguments_are_left_as_they_are() -> None:
    weight, hessian = problem()
    hessian[5] = hessian[:, 5] = 0
    copies = weight.clone(), hessian.clone()
    gptq(weight, hessian, bits=4, group_size=GROUP, desc_act=True)
    assert torch.equal(weight, copies[0]) and torch.equal(hessian, copies[1])


def awkward_weight() -> torch.Tensor:
    """Rows that a scale in float16 or a zero point in the codes' range is hard to find for."""
    weight, _ = problem(columns=GROUP, rows=8)
    weight[0] = 0
    weight[1] *= 1e-9
    weight[2] *= 1e8
    weight[3] = weight[3].abs()
    weight[4] = -weight[4].abs()
    weight[5] = 1
    weight[6, 0] = 1e6
    return weight


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_result_fits_the_format(bits: int, sym: bool) -> None:
    weight, (_, hessian) = awkward_weight(), problem(columns=GROUP)
    for static_groups in (False, True):
        result: GptqResult = gptq(
            weight, hessian, bits=bits, group_size=16, sym=sym, static_groups=static_groups
        )
        assert result.zeros.dtype == torch.int32
        assert result.zeros.min() >= 1 and result.zeros.max() <= 2**bits - 1
        assert not sym or (result.zeros == 2 ** (bits - 1)).all()
        assert result.codes.dtype == torch.uint8 and result.codes.max() <= 2**bits - 1
        assert torch.equal(result.scales, result.scales.half().float())
        assert (result.scales > 0).all() and result.scales[2].tolist() == [65504, 65504]
        steps = result.codes.int() - result.zeros[:, result.g_idx]
        assert torch.equal(result.weight, steps * result.scales[:, result.g_idx])


@pytest.mark.parametrize("sym", [True, False])
def test_scales_are_the_best_of_the_shrunk_ranges(sym: bool) -> None:
    weight, _ = problem(columns=GROUP)
    importance = torch.linspace(0.01, 4, GROUP) ** 3
    scales, zeros = find_scales(weight, importance, 4, sym)
    costs = []
    for shrink in range(21):
        high = weight.abs().amax(1) if sym else weight.amax(1)
        low = -high if sym else weight.amin(1)
        scale = ((high - low) * (1 - 0.025 * shrink) / 15).half().float()
        zero = torch.full_like(scale, 8) if sym else (-low * (1 - 0.025 * shrink) / scale).round()
        codes = rounded(weight, scale[:, None], zero[:, None], torch.zeros(GROUP, dtype=torch.long), 4)
        costs.append((((codes - zero[:, None]) * scale[:, None] - weight).square() * importance).sum(1))
    codes = rounded(weight, scales[:, None], zeros[:, None], torch.zeros(GROUP, dtype=torch.long), 4)
    found = (((codes - zeros[:, None]) * scales[:, None] - weight).square() * importance).sum(1)
    assert torch.allclose(found, torch.stack(costs).amin(0), rtol=1e-4)
    assert (found < costs[0]).sum() > ROWS // 4
