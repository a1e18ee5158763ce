"""The divergence from predictions of which only the likeliest tokens are known."""

import math

import pytest
import torch
from torch.nn import functional

from mkaq.distill.loss import Predictions, divergence, likeliest, next_token_loss

TOKENS, VOCABULARY = 7, 40


def logits(seed: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def test_known_values() -> None:
    told = likeliest(torch.tensor([[0.7, 0.2, 0.06, 0.04]]).log(), 2)
    assert told.ids.tolist() == [[0, 1]] and told.ids.dtype == torch.int32
    assert told.log_probs.exp().tolist()[0] == pytest.approx([0.7, 0.2], abs=1e-3)
    assert told.rest.exp().item() == pytest.approx(0.1, abs=1e-3)
    apart, slope = divergence(torch.tensor([[0.4, 0.4, 0.1, 0.1]]).log(), told)
    expected = 0.7 * math.log(0.7 / 0.4) + 0.2 * math.log(0.2 / 0.4) + 0.1 * math.log(0.1 / 0.2)
    assert apart.item() == pytest.approx(expected, abs=1e-3)
    assert slope[0].tolist() == pytest.approx([-0.3, 0.2, 0.05, 0.05], abs=1e-3)


def test_with_all_tokens_it_is_the_divergence() -> None:
    source, own = logits(0), logits(1)
    apart, _ = divergence(own, likeliest(source, VOCABULARY))
    whole = functional.kl_div(own.log_softmax(-1), source.log_softmax(-1), log_target=True, reduction="none")
    assert torch.allclose(apart, whole.sum(-1), atol=2e-3)


@pytest.mark.parametrize("k", [1, 8, VOCABULARY - 1])
def test_it_is_less_than_the_whole_divergence_and_0_for_the_same(k: int) -> None:
    source, own = logits(0), logits(1)
    apart, _ = divergence(own, likeliest(source, k))
    whole = functional.kl_div(own.log_softmax(-1), source.log_softmax(-1), log_target=True, reduction="none")
    assert bool((apart <= whole.sum(-1) + 2e-3).all()) and bool((apart > 0).all())
    same, slope = divergence(source, likeliest(source, k))
    assert float(same.abs().max()) < 1e-5 and float(slope.abs().max()) < 1e-3


@pytest.mark.parametrize("k", [1, 8, VOCABULARY])
def test_slopes_are_those_of_the_loss(k: int) -> None:
    told, own = likeliest(logits(0), k), logits(1).double().requires_grad_()
    p = torch.cat([told.log_probs, told.rest[:, None]], -1).double().softmax(-1)
    log_q = own.log_softmax(-1)
    parts = [log_q.gather(-1, told.ids.long())]
    if k < VOCABULARY:
        parts.append(log_q.scatter(-1, told.ids.long(), -torch.inf).logsumexp(-1, keepdim=True))
    log_q_parts = torch.cat(parts, -1)
    loss = -(p[:, : log_q_parts.shape[-1]] * log_q_parts).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert own.grad is not None
    assert torch.allclose(divergence(own.detach().float(), told)[1], own.grad.float(), atol=1e-5)


def test_sure_predictions_stay_finite() -> None:
    sure = torch.zeros(1, VOCABULARY)
    sure[0, 3] = 200.0
    for told in (likeliest(sure, 4), likeliest(logits(0)[:1], 4)):
        for own in (sure, -sure, logits(1)[:1]):
            apart, slope = divergence(own, told)
            assert bool(apart.isfinite().all()) and bool(slope.isfinite().all())


def test_next_token_loss() -> None:
    own, labels = logits(1).requires_grad_(), torch.arange(TOKENS)
    loss, slope = next_token_loss(own.detach(), labels)
    expected = functional.cross_entropy(own, labels, reduction="none")
    expected.sum().backward()  # type: ignore[no-untyped-call]
    assert torch.allclose(loss, expected.detach()) and own.grad is not None
    assert torch.allclose(slope, own.grad, atol=1e-6)


def test_on_a_device_it_is_the_same() -> None:
    told = likeliest(logits(0), 3)
    assert all(torch.equal(a, b) for a, b in zip(told, told.to(torch.device("cpu")), strict=True))
    assert isinstance(told, Predictions)
