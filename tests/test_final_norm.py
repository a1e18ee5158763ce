"""Rescaling the final norm: what is known in closed form, and the tensor that comes of it."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mkaq.checkpoint.validate import open_checkpoint
from mkaq.fit.final_norm import norm_error, rescale, scaled_norm
from mkaq.fit.hold_out import hold_out
from mkaq.walk.walk import LayerWalk
from tests.tiny import FAMILIES, make_model

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
FINAL_NORM = "model.norm.weight"
STATES = torch.randn(32, 64, 64, generator=torch.Generator().manual_seed(3))
SAMPLES = hold_out(torch.zeros(32, 64))


def noise(size: float) -> torch.Tensor:
    return torch.randn(STATES.shape, generator=torch.Generator().manual_seed(4)) * size


def walk_with(model: Path, weight: torch.Tensor) -> LayerWalk:
    """A walk over a model with this final norm."""
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, FINAL_NORM: weight}, model / "model.safetensors", metadata={"format": "pt"})
    return LayerWalk(open_checkpoint(model), CPU)


@pytest.fixture
def walk(tmp_path: Path) -> LayerWalk:
    """A model whose final norm multiplies by 1."""
    return walk_with(make_model(tmp_path / "model"), torch.ones(64, dtype=torch.bfloat16))


@pytest.mark.parametrize("length", [1.0, 0.25, 8.0])
def test_length_alone_asks_for_nothing(length: float, walk: LayerWalk) -> None:
    found = rescale(walk, walk, STATES, STATES * length, SAMPLES)
    assert found.scale == 1 and found.error == found.error_before == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("size", [0.1, 0.5, 2.0])
def test_independent_error_asks_for_the_cosine(size: float, walk: LayerWalk) -> None:
    """Of x and x + e, normed to one length, it is their cosine, 1 / sqrt(1 + |e|^2 / |x|^2)."""
    found = rescale(walk, walk, STATES, STATES + noise(size), SAMPLES)
    cosine = 1 / math.sqrt(1 + size**2)
    assert found.scale == pytest.approx(cosine, abs=0.01)
    assert found.error_before == pytest.approx(2 - 2 * cosine, abs=0.01)  # 1 - 2 s cos + s^2
    assert found.error == pytest.approx(1 - cosine**2, abs=0.01)
    held = (
        STATES[-4:],
        (STATES + noise(size))[-4:],
        SAMPLES.held_out_only(),
    )  # what they miss needs no other tokens
    assert norm_error(walk, walk, *held) == pytest.approx(found.error_before, rel=1e-6)


def test_what_the_compressed_norm_has_already_counts(walk: LayerWalk, tmp_path: Path) -> None:
    half = walk_with(make_model(tmp_path / "half"), torch.full((64,), 0.5, dtype=torch.bfloat16))
    found = rescale(walk, half, STATES, STATES, SAMPLES)
    assert found.scale == 2 and found.error_before == pytest.approx(0.25) and found.error < 1e-6


def test_factor_that_does_not_hold_elsewhere_is_not_taken(walk: LayerWalk) -> None:
    """The last eighth is held out: an error in the rest alone says nothing of it."""
    wrong = STATES + noise(2.0)
    wrong[-4:] = STATES[-4:]
    assert rescale(walk, walk, STATES, STATES + noise(2.0), SAMPLES).scale < 0.6
    found = rescale(walk, walk, STATES, wrong, SAMPLES)
    assert found.scale == 1 and found.error == found.error_before == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_scaled_weight_scales_the_output(family: str, tmp_path: Path) -> None:
    source = open_checkpoint(make_model(tmp_path / "model", family))
    weight = source.read([FINAL_NORM])[FINAL_NORM].float()
    scaled = scaled_norm(weight, 0.75, source.arch.norm_offset, torch.float32)
    walk = LayerWalk(source, CPU)
    with walk.final_norm() as norm, torch.no_grad():
        norm.weight = torch.nn.Parameter(weight)
        before = norm(STATES)
        norm.weight = torch.nn.Parameter(scaled)
        after = norm(STATES)
    assert torch.allclose(after, before * 0.75, atol=1e-5)
    assert scaled_norm(weight, 1.0, source.arch.norm_offset, torch.bfloat16).equal(weight.bfloat16())
