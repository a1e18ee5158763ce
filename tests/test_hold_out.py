"""Errors of hidden states on held-out samples, and calibration tokens mixed with repeated phrases."""

import pytest
import torch

from mkaq.calibrate.tokens import with_copies
from mkaq.merge.hold_out import held_out_error, held_out_samples, mean_relative_error, token_weights


def period_of(row: list[int]) -> int:
    """The shortest phrase that repeated to the end gives the row."""
    return next(p for p in range(1, len(row) + 1) if all(x == row[i % p] for i, x in enumerate(row)))


def some_tokens(samples: int = 9, length: int = 64, prefix: int | None = 0) -> torch.Tensor:
    """Different multiples of 7, after a first token that all samples share unless `prefix` is None."""
    body = torch.arange(1, samples * length + 1, dtype=torch.int32).reshape(samples, length) * 7
    if prefix is not None:
        body[:, 0] = prefix
    return body


@pytest.mark.parametrize(
    ("samples", "held"), [(1, 1), (7, 1), (8, 1), (15, 1), (16, 2), (128, 16), (130, 16)]
)
def test_an_eighth_is_held_out(samples: int, held: int) -> None:
    assert held_out_samples(samples) == held


def test_tokens_weigh_the_inverse_of_their_mean_square() -> None:
    target = torch.tensor([[[3.0, 4.0], [1.0, 1.0]], [[0.0, 2.0], [100.0, 0.0]]])
    assert torch.allclose(token_weights(target), torch.tensor([[1 / 12.5, 1.0], [0.5, 1 / 5000]]))
    assert token_weights(target.bfloat16()).dtype == torch.float32
    assert token_weights(torch.zeros(2, 4)).isfinite().all()


def test_error_is_the_mean_of_the_tokens_shares() -> None:
    target = torch.tensor([[[3.0, 4.0], [0.0, 100.0]]])
    states = torch.tensor([[[3.0, 5.0], [0.0, 50.0]]])
    assert mean_relative_error(states, target) == pytest.approx((1 / 25 + 1 / 4) / 2)
    assert mean_relative_error(target, target) == 0
    assert mean_relative_error(torch.zeros_like(target), target) == pytest.approx(1)


def test_held_out_samples_are_the_last_eighth() -> None:
    target = torch.ones(16, 3, 4)
    for sample in range(16):
        states = target.clone()
        states[sample] = 3
        assert held_out_error(states, target) == pytest.approx(2.0 if sample >= 14 else 0)
    assert held_out_error(2 * target[:3], target[:3]) == pytest.approx(1)
    last = target[:3].clone()
    last[2] = 0
    assert held_out_error(last, target[:3]) == pytest.approx(1)


@pytest.mark.parametrize("seed", range(5))
def test_every_third_row_repeats_a_phrase_of_known_tokens(seed: int) -> None:
    tokens = some_tokens()
    before = tokens.clone()
    mixed = with_copies(tokens, seed)
    assert torch.equal(tokens, before) and mixed.dtype == tokens.dtype and mixed.shape == tokens.shape
    known = set(tokens[:, 1:].flatten().tolist())
    for row in range(9):
        if row % 3 != 2:
            assert torch.equal(mixed[row], tokens[row])
            continue
        body = mixed[row, 1:].tolist()
        assert mixed[row, 0] == 0 and set(body) <= known and 0 not in body
        assert 4 <= period_of(body) <= 32 and body != tokens[row, 1:].tolist()


def test_phrases_differ_in_length_and_their_tokens_come_from_everywhere() -> None:
    tokens = some_tokens(samples=120)
    bodies = [row[1:].tolist() for row in with_copies(tokens, 0)[2::3]]
    periods = [period_of(body) for body in bodies]
    assert 4 <= min(periods) < 10 and 26 < max(periods) <= 32 and len(set(periods)) > 10
    samples_drawn_from = {(token // 7 - 1) // 64 for body in bodies for token in body}
    assert len(samples_drawn_from) > 110


def test_every_known_token_is_as_likely() -> None:
    tokens = torch.full((300, 20), 5, dtype=torch.int32)
    tokens[0, 10:] = 6  # rare in the text, half of the different tokens
    tokens[:, 0] = 1
    share = (with_copies(tokens, 0)[2::3, 1:] == 6).float().mean()
    assert share == pytest.approx(0.5, abs=0.1)


def test_first_tokens_stay_only_where_all_share_them() -> None:
    with_prefix, without = some_tokens(300, 16), some_tokens(300, 16, prefix=None)
    assert (with_copies(with_prefix, 0)[:, 0] == 0).all()
    mixed = with_copies(without, 0)
    assert all(period_of(row.tolist()) <= 8 for row in mixed[2::3])
    assert (mixed[2::3, 0] != without[2::3, 0]).any()


def test_seed_decides() -> None:
    tokens = some_tokens()
    assert torch.equal(with_copies(tokens, 3), with_copies(tokens, 3))
    assert not torch.equal(with_copies(tokens, 3), with_copies(tokens, 4))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8])
def test_short_samples_are_fine(length: int) -> None:
    tokens = some_tokens(6, length, prefix=None)
    mixed = with_copies(tokens, 0)
    assert mixed.shape == tokens.shape and set(mixed.flatten().tolist()) <= set(tokens.flatten().tolist())
