"""Perplexity: closed forms, a uniform model, and transformers' own loss."""

import math
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mkaq.checkpoint.validate import open_checkpoint
from mkaq.evaluate.perplexity import Perplexity, perplexity, summarize
from mkaq.progress import Progress
from mkaq.walk.walk import LayerWalk


def sequences(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 4096, (n,), generator=generator).tolist() for n in lengths]


def measure(model: Path, rows: list[list[int]]) -> Perplexity:
    return perplexity(LayerWalk(open_checkpoint(model), torch.device("cpu")), rows, Progress(quiet=True))


def test_mean_is_over_tokens_not_over_sequences() -> None:
    result = summarize([10.0, 90.0], [10, 30])
    assert result.perplexity == pytest.approx(math.exp(100 / 40))
    assert (result.tokens, result.sequences) == (40, 2)
    assert result.standard_error == pytest.approx(result.perplexity * 30 / 40)  # deviations of 15 and 15 nats


def test_standard_error_of_equal_sequences_is_the_textbook_one() -> None:
    losses, count = [3.0, 5.0, 4.0, 8.0, 6.5], 4
    means = [loss / count for loss in losses]
    result = summarize(losses, [count] * 5)
    expected = statistics.stdev(means) / math.sqrt(5)
    assert result.perplexity == pytest.approx(math.exp(statistics.mean(means)))
    assert result.standard_error == pytest.approx(result.perplexity * expected)


def test_sequences_that_agree_have_no_error_and_huge_losses_are_infinite() -> None:
    assert summarize([2.0, 6.0], [2, 6]) == Perplexity(math.e, 0.0, 8, 2)
    assert summarize([5.0], [5]) == Perplexity(math.e, None, 5, 1)
    assert summarize([1e6, 5.0], [5, 5]) == Perplexity(math.inf, None, 10, 2)


def test_uniform_model_has_the_vocabulary_as_perplexity(tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"].zero_()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    result = measure(model, sequences(24, 24, 7))
    assert result.perplexity == pytest.approx(4096, rel=1e-5)
    assert result.standard_error < 0.1
    assert (result.tokens, result.sequences) == (23 + 23 + 6, 3)


@pytest.mark.parametrize("lengths", [(40, 40, 40, 11), (40, 40), (25,), (40, 2)])
def test_equals_the_loss_of_transformers(tiny: Path, lengths: tuple[int, ...]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    rows, total = sequences(*lengths), 0.0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row])
            total += model(ids, labels=ids, use_cache=False).loss.item() * (len(row) - 1)
    tokens = sum(length - 1 for length in lengths)
    result = measure(tiny, rows)
    assert (result.tokens, result.sequences) == (tokens, len(lengths))
    assert result.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-5)
