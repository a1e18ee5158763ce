"""The final norm tuned toward the source's predictions."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mkaq.checkpoint.validate import open_checkpoint
from mkaq.fit.hold_out import hold_out
from mkaq.recover.final_norm import TunedNorm, tune_final_norm
from mkaq.walk.walk import LayerWalk
from tests.tiny import make_model

pytestmark = pytest.mark.usefixtures("one_thread")
CPU, NORM, SINGLE = torch.device("cpu"), "model.norm.weight", "model.safetensors"


def tuned(folder: Path, family: str, factors: torch.Tensor) -> tuple[TunedNorm, torch.Tensor]:
    """Tunes a model that is the source but for factors of its final norm; also the source's own weight."""
    source = open_checkpoint(make_model(folder / "source", family, layers=2))
    model = make_model(folder / "model", family, layers=2)
    tensors = load_file(model / SINGLE)
    offset, own = float(family == "gemma2"), tensors[NORM]
    tensors[NORM] = ((own.float() + offset) * factors - offset).to(own.dtype)
    save_file(tensors, model / SINGLE, metadata={"format": "pt"})
    tokens = torch.randint(2, 500, (64, 32), generator=torch.Generator().manual_seed(0))
    samples, walks = hold_out(tokens), [LayerWalk(c, CPU) for c in (source, open_checkpoint(model))]
    states = [walk.embed(samples.tokens) for walk in walks]
    for walk, state in zip(walks, states, strict=True):
        for index in range(walk.num_layers):
            walk.pass_layer(index, state)
    return tune_final_norm(*walks, *states, samples, torch.float32, 0), own


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
def test_factors_are_found_again(tmp_path: Path, family: str) -> None:
    spread = torch.linspace(-0.2, 0.2, 64).exp()
    done, own = tuned(
        tmp_path, family, spread[torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    )
    assert 0 < done.divergence < 0.7 * done.divergence_before
    assert done.error < done.error_before
    assert done.weight.shape == own.shape and done.weight.dtype == torch.float32


def test_a_norm_that_is_right_stays(tmp_path: Path) -> None:
    done, own = tuned(tmp_path, "llama", torch.ones(64))
    assert done.weight.equal(own.float())
    assert done.divergence == done.divergence_before == pytest.approx(0, abs=1e-6)
    assert done.error == done.error_before
