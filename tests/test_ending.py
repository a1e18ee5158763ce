"""The last layer tuned toward the source's predictions."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mkaq.checkpoint.validate import open_checkpoint
from mkaq.fit.hold_out import hold_out
from mkaq.recover.ending import tune_ending
from mkaq.recover.steps import Descent, Tuning
from mkaq.walk.walk import LayerWalk
from tests.tiny import make_model

pytestmark = pytest.mark.usefixtures("one_thread")
CPU, SINGLE = torch.device("cpu"), "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


def tuned(
    folder: Path, family: str, up: float, *, steps: int = 100
) -> tuple[Descent, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Tunes a model that is the source but for a factor of the last layer's up_proj.

    Returns:
        The outcome, the model's tensors, and those of the last layer after it.
    """
    source = open_checkpoint(make_model(folder / "source", family, layers=2))
    model = make_model(folder / "model", family, layers=2)
    tensors = load_file(model / SINGLE)
    tensors[UP] = tensors[UP] * up
    save_file(tensors, model / SINGLE, metadata={"format": "pt"})
    tokens = torch.randint(2, 500, (64, 8), generator=torch.Generator().manual_seed(0))
    samples = hold_out(tokens)
    walks = [LayerWalk(c, CPU) for c in (source, open_checkpoint(model))]
    original, inputs = (walk.embed(samples.tokens) for walk in walks)
    for index in range(2):
        walks[0].pass_layer(index, original)
    walks[1].pass_layer(0, inputs)
    with walks[1].layer(1) as layer:
        tuning = Tuning(steps, 4e-3, batch_size=32, seed=0)
        done = tune_ending(*walks, layer, inputs, original, samples, tuning, torch.float32)
        after = {f"model.layers.1.{name}": p.clone() for name, p in layer.named_parameters()}
    return done, tensors, after


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_what_the_head_needs_is_found_again(tmp_path: Path, family: str) -> None:
    done, tensors, layer = tuned(tmp_path, family, 0.5)
    assert 0 < done.error < 0.5 * done.before
    assert done.step in (16, 32, 48)
    assert not layer[UP].equal(tensors[UP].float())


def test_few_steps_are_kept_to(tmp_path: Path) -> None:
    done, *_ = tuned(tmp_path, "llama", 0.5, steps=3)
    assert 0 < done.step <= 3


def test_a_layer_that_is_right_stays(tmp_path: Path) -> None:
    done, tensors, layer = tuned(tmp_path, "llama", 1.0)
    assert done.step == 0 and done.error == done.before == pytest.approx(0, abs=1e-6)
    assert all(layer[name].equal(tensors[name].float()) for name in layer)
