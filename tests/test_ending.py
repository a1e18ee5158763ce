"""The last layer and the final norm tuned toward the source's predictions."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mkaq.checkpoint.validate import open_checkpoint
from mkaq.fit.hold_out import hold_out
from mkaq.recover.ending import Ending, tune_ending, tuned_norm
from mkaq.recover.steps import Tuning
from mkaq.walk.walk import LayerWalk
from tests.tiny import make_model

pytestmark = pytest.mark.usefixtures("one_thread")
CPU, NORM, SINGLE = torch.device("cpu"), "model.norm.weight", "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


def tuned(
    folder: Path,
    family: str,
    factors: torch.Tensor,
    *,
    learning_rate: float = 0.0,
    steps: int = 100,
    up: float = 1.0,
) -> tuple[Ending, dict[str, torch.Tensor], dict[str, torch.Tensor], list[float]]:
    """Tunes a model that is the source but for factors of its final norm and of the last layer's up_proj.

    Returns:
        The outcome, the model's tensors, those of the last layer after it, and the errors of the norm.
    """
    source = open_checkpoint(make_model(folder / "source", family, layers=2))
    model = make_model(folder / "model", family, layers=2)
    tensors = load_file(model / SINGLE)
    offset = float(family == "gemma2")
    tensors[NORM] = ((tensors[NORM].float() + offset) * factors - offset).to(tensors[NORM].dtype)
    tensors[UP] = tensors[UP] * up
    save_file(tensors, model / SINGLE, metadata={"format": "pt"})
    tokens = torch.randint(2, 500, (64, 32), generator=torch.Generator().manual_seed(0))
    samples = hold_out(tokens)
    walks = [LayerWalk(c, CPU) for c in (source, open_checkpoint(model))]
    original, inputs = (walk.embed(samples.tokens) for walk in walks)
    for index in range(2):
        walks[0].pass_layer(index, original)
    walks[1].pass_layer(0, inputs)
    with walks[1].layer(1) as layer:
        tuning = Tuning(steps, learning_rate, batch_size=32, seed=0)
        done = tune_ending(*walks, layer, inputs, original, samples, tuning, torch.float32)
        walks[1].run_all(layer, 1, inputs)
        after = {f"model.layers.1.{name}": p.clone() for name, p in layer.named_parameters()}
    norm = tuned_norm(*walks, original, inputs, samples, done)
    assert (norm.divergence_before, norm.divergence) == (done.divergence_before, done.divergence)
    return done, tensors, after, [norm.error_before, norm.error]


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
def test_factors_are_found_again(tmp_path: Path, family: str) -> None:
    spread = torch.linspace(-0.2, 0.2, 64).exp()
    factors = spread[torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    done, tensors, layer, (before, after) = tuned(tmp_path, family, factors)
    assert 0 < done.divergence < 0.7 * done.divergence_before
    assert after < before
    assert done.norm.shape == tensors[NORM].shape and done.norm.dtype == torch.float32
    assert done.steps == 48
    assert all(layer[name].equal(tensors[name].float()) for name in layer)  # at a rate of 0


def test_the_last_layer_is_tuned_with_it(tmp_path: Path) -> None:
    outcomes = [
        tuned(tmp_path / str(rate), "llama", torch.ones(64), learning_rate=rate, up=0.5) for rate in (0, 4e-3)
    ]
    (alone, *_), (both, tensors, layer, _) = outcomes
    assert both.divergence < 0.5 * alone.divergence <= 0.5 * alone.divergence_before
    assert not layer[UP].equal(tensors[UP].float())


def test_few_steps_are_kept_to(tmp_path: Path) -> None:
    done, *_ = tuned(tmp_path, "llama", torch.full((64,), 0.5), steps=3)
    assert done.steps == 3


def test_an_end_that_is_right_stays(tmp_path: Path) -> None:
    done, tensors, layer, (before, after) = tuned(tmp_path, "llama", torch.ones(64), learning_rate=4e-3)
    assert done.norm.equal(tensors[NORM].float()) and done.steps == 0
    assert all(layer[name].equal(tensors[name].float()) for name in layer)
    assert done.divergence == done.divergence_before == pytest.approx(0, abs=1e-6)
    assert before == after
