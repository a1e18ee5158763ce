"""Calibration tokens in random order: which are, what stays, and that the seed decides."""

import pytest
import torch

from mkaq.fit.shuffle import in_random_order, part_in_random_order, probing_tokens


def some_tokens(samples: int = 9, length: int = 64, prefix: int | None = 0) -> torch.Tensor:
    """Different multiples of 7, after a first token that all samples share unless `prefix` is None."""
    body = torch.arange(1, samples * length + 1, dtype=torch.int32).reshape(samples, length) * 7
    if prefix is not None:
        body[:, 0] = prefix
    return body


def test_every_fourth_sequence_is_in_random_order() -> None:
    tokens = some_tokens(20)
    before = tokens.clone()
    mixed = part_in_random_order(tokens, 0)
    assert torch.equal(tokens, before) and mixed.dtype == tokens.dtype
    text = [row for row in range(20) if row % 4 != 3]
    assert torch.equal(mixed[text], tokens[text])
    assert torch.equal(mixed[3::4], in_random_order(tokens[3::4], 0))
    assert not torch.equal(mixed[3::4], part_in_random_order(tokens, 1)[3::4])


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_few_and_short_samples_are_fine(samples: int, length: int) -> None:
    tokens = some_tokens(samples, length, prefix=None)
    mixed = part_in_random_order(tokens, 0)
    assert mixed.shape == tokens.shape and torch.equal(mixed.sort(1).values, tokens)


@pytest.mark.parametrize("prefix", [0, None])
def test_shuffled_sequences_keep_their_tokens_and_lose_their_order(prefix: int | None) -> None:
    tokens = some_tokens(20, prefix=prefix)
    before = tokens.clone()
    mixed = in_random_order(tokens, 0)
    assert torch.equal(tokens, before) and mixed.dtype == tokens.dtype
    assert torch.equal(mixed.sort(1).values, tokens.sort(1).values)
    assert not (mixed == tokens).all(1).any()
    assert torch.equal(mixed[:, 0], tokens[:, 0]) == (prefix is not None)
    assert torch.equal(mixed, in_random_order(tokens, 0)) and not torch.equal(
        mixed, in_random_order(tokens, 1)
    )
    orders = {tuple(row.argsort().argsort().tolist()) for row in mixed}
    assert len(orders) == 20  # not the same order everywhere


@pytest.mark.parametrize("length", [1, 3, 7, 64])
def test_probes_are_text_and_random_phrases_repeated(length: int) -> None:
    tokens = some_tokens(5, length, prefix=None)
    text, repeated = probing_tokens(tokens, 3).chunk(2)
    assert torch.equal(text, tokens)
    size = max(1, length // 4)
    phrase = in_random_order(tokens, 3)[:, :size]
    assert torch.equal(repeated, phrase.repeat(1, length)[:, :length])
