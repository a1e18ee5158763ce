"""Which weights of a distillation are kept, and when it ends."""

import pytest

from mkaq.distill.gate import MUCH, PATIENCE, Check, best_check, is_over, length_of_steps


def curve(*pairs: tuple[float, float]) -> list[Check]:
    return [Check(4 * number, 0.1 if number else None, *pair) for number, pair in enumerate(pairs)]


@pytest.mark.parametrize(
    ("pairs", "best"),
    [
        ([(1.0, 2.0)], 0),
        ([(1.0, 2.0), (0.5, 1.5)], 1),
        ([(1.0, 2.0), (0.5, 2.1)], 0),  # learned at the cost of other text
        ([(1.0, 2.0), (1.1, 1.0)], 0),
        ([(1.0, 2.0), (0.9, 1.0), (0.5, 1.9)], 1),  # 1.4 against 1.45
        ([(1.0, 2.0), (0.5, 1.5), (0.5, 1.5)], 1),  # the earlier of two
        ([(0.0, 0.0), (0.0, 0.0)], 0),
        ([(1.0, 2.0), (float("nan"), 1.0), (float("inf"), 1.0)], 0),
    ],
)
def test_the_best_is_better_on_both_texts(pairs: list[tuple[float, float]], best: int) -> None:
    assert best_check(curve(*pairs)) == best


def test_it_is_over_once_nothing_is_learned_for_long() -> None:
    rising = [(1.0, 2.0), (0.5, 1.0), *[(0.6, 1.0)] * PATIENCE]
    assert is_over(curve(*rising)) and not is_over(curve(*rising[:-1]))
    assert not is_over(curve(*rising[:-1], (0.4, 3.0)))
    assert not is_over(curve((1e-3, 1.0)))
    assert not is_over(curve(*[(1.0 - 0.1 * number, 3.0 + number) for number in range(9)]))


@pytest.mark.parametrize("rounded", [0.0, -5e-9, 3e-8])
def test_it_is_over_at_once_where_nothing_was_lost(rounded: float) -> None:
    assert is_over(curve((rounded, rounded)))


@pytest.mark.parametrize(
    ("own", "plain", "eased"),
    [
        ([0.5], 1.0, 1.0),
        ([0.5, 0.4, 0.3], 1.0, 1.0),
        ([0.5, 0.6], 0.5, 0.5),
        ([0.5, 0.6, 0.55], 0.25, 0.25),  # better than the one before it, not than the best
        ([0.5, 0.6, 0.4, 0.5], 0.25, 0.25),
        ([MUCH / 4], 1.0, 0.25),
        ([MUCH / 4, MUCH], 0.5, 0.125),
        ([0.0], 1.0, 0.0),
    ],
)
def test_steps_are_shorter_where_longer_ones_harm(own: list[float], plain: float, eased: float) -> None:
    checks = curve(*[(value, 1.0) for value in own])
    assert length_of_steps(checks, eased=False) == plain
    assert length_of_steps(checks, eased=True) == pytest.approx(eased)
