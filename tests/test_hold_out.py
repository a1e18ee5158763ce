"""Errors of hidden states on held-out samples, and who holds out which."""

import pytest
import torch

from mkaq.checkpoint.validate import open_checkpoint
from mkaq.fit.hold_out import (
    Samples,
    held_out_error,
    held_out_samples,
    hold_out,
    token_errors,
    token_weights,
)
from mkaq.ranks import Ranks
from mkaq.walk.walk import LayerWalk
from tests.tiny import make_model


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
    assert token_errors(states, target)[0].tolist() == pytest.approx([1 / 25, 1 / 4])
    assert token_errors(target, target)[0].tolist() == [0, 0]
    assert token_errors(torch.zeros_like(target), target)[0].tolist() == pytest.approx([1, 1])


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> LayerWalk:
    model = make_model(tmp_path_factory.mktemp("walk") / "model")
    return LayerWalk(open_checkpoint(model), torch.device("cpu"))


def test_held_out_samples_are_the_last_eighth(walk: LayerWalk) -> None:
    target = torch.ones(16, 3, 4)
    samples = hold_out(target[..., 0])
    for sample in range(16):
        states = target.clone()
        states[sample] = 3
        assert held_out_error(walk, samples, states, target) == pytest.approx(2.0 if sample >= 14 else 0)
        assert held_out_error(walk, samples.held(), states[14:], target[14:]) == held_out_error(
            walk, samples, states, target
        )
    few = hold_out(target[:3, :, 0])
    assert held_out_error(walk, few, 2 * target[:3], target[:3]) == pytest.approx(1)
    last = target[:3].clone()
    last[2] = 0
    assert held_out_error(walk, few, last, target[:3]) == pytest.approx(1)


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 8, 24])
@pytest.mark.parametrize("count", [1, 8, 19, 30, 128])
def test_any_number_of_samples_is_shared_by_any_number_of_processes(count: int, processes: int) -> None:
    """What is learned from and what is held out is the same as of one process."""
    tokens = torch.arange(count)[:, None]
    alone = hold_out(tokens)
    parts = [hold_out(tokens, Ranks(rank, processes)) for rank in range(processes)]
    learned = torch.cat([part.tokens[: part.learned] for part in parts])
    held = torch.cat([part.tokens[part.learned :] for part in parts])
    assert torch.equal(torch.cat([learned, held]), tokens)
    assert len(held) == alone.held_out == held_out_samples(count)
    for part in parts:
        assert not part.learned or int(part.tokens[0]) == part.first
        slices = [list(range(len(part.tokens)))[rows] for half in part.halves() for rows in half]
        assert [number for rows in slices for number in rows] == list(range(len(part.tokens)))


def test_process_without_samples_has_no_batches() -> None:
    assert Samples(torch.empty(0, 32), 0).halves() == ([], [])
