"""Fusing by channels: what must hold of a fused layer."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mkaq.checkpoint.validate import open_checkpoint
from mkaq.fit.hold_out import hold_out
from mkaq.fit.targets import advance
from mkaq.merge.channels import FusedLayer, fuse, pass_fused
from mkaq.merge.cost import best_average
from mkaq.merge.solve import first_batch
from mkaq.merge.write import digest_layer
from mkaq.ranks import Ranks
from mkaq.walk.hooks import outputs_of
from mkaq.walk.walk import LayerWalk
from tests.tiny import make_model

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
SINGLE = "model.safetensors"
TOKENS = torch.randint(2, 4096, (16, 32), generator=torch.Generator().manual_seed(1))
SAMPLES = hold_out(TOKENS)


def edited(model: Path, copy: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a model with other weights."""
    tensors = load_file(shutil.copytree(model, copy) / SINGLE)
    edit(tensors)
    save_file(tensors, copy / SINGLE, metadata={"format": "pt"})
    return copy


def silence(layer: int) -> Callable[[dict[str, torch.Tensor]], None]:
    """Lets a layer add nothing to the residual stream."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.{layer}.{name}.weight"].zero_()

    return edit


def streams(model: Path, before: int) -> torch.Tensor:
    """Hidden states of a model before a layer."""
    walk = LayerWalk(open_checkpoint(model), CPU)
    states = walk.embed(TOKENS)
    for index in range(before):
        walk.pass_layer(index, states)
    return states


def fuse_at(
    model: Path, group: list[int], states: torch.Tensor, compressed: torch.Tensor | None = None
) -> tuple[FusedLayer, float]:
    """Fuses a group on hidden states that no error has reached, unless others are given."""
    walk = LayerWalk(open_checkpoint(model), CPU)
    original, compressed = states.clone(), (states if compressed is None else compressed).clone()
    layer = fuse(walk, group, original, compressed, SAMPLES, torch.bfloat16)
    return layer, pass_fused(walk, layer, original, compressed, SAMPLES)


@pytest.fixture(scope="module", params=["llama", "qwen2", "phi3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp(request.param) / "model", request.param)


@pytest.mark.parametrize("idle", [1, 2])
def test_group_with_an_idle_layer_is_fused_without_error(idle: int, model: Path, tmp_path: Path) -> None:
    """Its other layer fits in whole; into the first one's place it comes with its norm folded in."""
    path = edited(model, tmp_path / "idle", silence(idle))
    states = streams(path, 1)
    layer, residual = fuse_at(path, [1, 2], states)
    assert residual < 1e-3
    assert fuse_at(model, [1, 2], states)[1] > 0.03
    taken = layer.channels[:, 0] == 3 - idle
    assert taken.float().mean() > 0.9


def test_fusing_is_no_worse_than_dropping_the_followers(model: Path) -> None:
    """But for what a larger ridge gives away on held-out text."""
    for group in ([1, 2], [2, 3], [1, 2, 3]):
        states = streams(model, group[0])
        walk = LayerWalk(open_checkpoint(model), CPU)
        dropped = best_average(walk, group, states.clone(), states.clone(), SAMPLES, 1.0)[1]
        assert fuse_at(model, group, states)[1] < 1.03 * dropped


def test_first_layer_alone_is_left_bit_identical(model: Path) -> None:
    layer, residual = fuse_at(model, [0], streams(model, 0))
    before = LayerWalk(open_checkpoint(model), CPU).layer_tensors(0)
    assert layer.tensors.keys() == before.keys()
    assert [name for name in before if not torch.equal(layer.tensors[name], before[name])] == []
    assert residual == 0
    for origins in (layer.heads, layer.channels):
        assert origins.tolist() == [[0, number] for number in range(len(origins))]


def test_lone_layer_corrects_the_error_that_reaches_it(model: Path) -> None:
    walk = LayerWalk(open_checkpoint(model), CPU)
    original = streams(model, 2)
    noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(2))
    mixed = original[..., torch.arange(original.shape[-1]).roll(1)] * 0.2 + noise * original.std() * 0.05
    compressed = original + mixed
    left = best_average(walk, [2], original.clone(), compressed.clone(), SAMPLES, 1.0)[1]
    layer, residual = fuse_at(model, [2], original, compressed)
    assert residual < 0.95 * left
    assert layer.attention.ridge is not None and layer.mlp.ridge is not None


def test_attention_is_asked_to_mend_the_error_that_reaches_it(model: Path) -> None:
    """Its target is what the group's attention adds in the source, and the error of the stream."""
    walk = LayerWalk(open_checkpoint(model), CPU)
    before, writer = streams(model, 1), "self_attn.o_proj"
    error = torch.randn(before.shape, generator=torch.Generator().manual_seed(2))
    added = torch.zeros_like(before)
    expected = before.clone()
    for index in (1, 2):
        with walk.layer(index) as layer, outputs_of(layer.get_submodule(writer)) as seen:
            walk.run_all(layer, index, expected)
            added += seen.pop()
    original, attended = before.clone(), torch.empty_like(before)
    advance(walk, [1, 2], writer, original, before + error, attended)
    assert torch.equal(original, expected)
    assert torch.allclose(attended, added - error, atol=1e-4)


@pytest.mark.parametrize(("samples", "length"), [(6, 32), (66, 128), (450, 128), (48, 2048), (6, 8192)])
def test_first_batch_is_the_same_for_any_number_of_processes(samples: int, length: int) -> None:
    tokens = torch.arange(samples)[:, None].expand(-1, length)
    alone = hold_out(tokens)
    expected = list(range(min(alone.learned, max(1, 4096 // length))))
    for size in (1, 2, 3, 8):
        parts = [hold_out(tokens, Ranks(rank, size)) for rank in range(size)]
        assert [int(row[0]) for part in parts for row in part.tokens[first_batch(part)]] == expected


def test_layer_is_made_of_its_group_alone(model: Path, tmp_path: Path) -> None:
    """Neither what lies before nor behind the group is looked at: it may be anything."""

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if ".layers.0." in name or ".layers.3." in name:
                tensors[name].fill_(float("nan"))

    path, states = edited(model, tmp_path / "spoiled", spoil), streams(model, 1)
    (one, left), (two, left_too) = fuse_at(model, [1, 2], states), fuse_at(path, [1, 2], states)
    assert digest_layer(one.tensors) == digest_layer(two.tensors)
    assert left == left_too
    for kind in ("heads", "channels"):
        origins = getattr(one, kind)
        assert torch.equal(origins, getattr(two, kind))
        assert set(origins[:, 0].tolist()) <= {1, 2} and len(origins.unique(dim=0)) == len(origins)


def test_readers_are_rows_of_the_old_layers(tmp_path: Path) -> None:
    """With equal norms nothing is folded: every row is found, bit for bit, where the origins say."""

    def same_norms(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.2.{name}.weight"] = tensors[f"model.layers.1.{name}.weight"].clone()

    path = edited(make_model(tmp_path / "model"), tmp_path / "equal", same_norms)
    layer, _ = fuse_at(path, [1, 2], streams(path, 1))
    walk = LayerWalk(open_checkpoint(path), CPU)
    old = {index: walk.layer_tensors(index) for index in (1, 2)}
    assert len(set(layer.channels[:, 0].tolist())) == 2
    for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
        rows = torch.stack([old[index][name][row] for index, row in layer.channels.tolist()])
        assert torch.equal(layer.tensors[name], rows)
    for name, size in (("self_attn.q_proj.weight", 32), ("self_attn.k_proj.weight", 16)):
        rows = torch.cat([old[i][name][head * size : head * size + size] for i, head in layer.heads.tolist()])
        assert torch.equal(layer.tensors[name], rows)
