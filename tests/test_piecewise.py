"""A layer run in pieces reads, and gives, what it does when it is run from its start."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from mkaq.errors import CheckpointError
from mkaq.model.checkpoint import open_checkpoint
from mkaq.model.observe import input_of
from mkaq.model.piecewise import Piecewise
from mkaq.model.walk import LayerWalk
from tests.tiny import FAMILIES, make_model

TOKENS = torch.randint(2, 4096, (6, 32), generator=torch.Generator().manual_seed(1))
WRITER = "self_attn.o_proj"


def halve(layer: nn.Module, name: str) -> None:
    linear = layer.get_submodule(name)
    linear.weight = nn.Parameter(linear.weight * 0.5, requires_grad=False)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fast", [False, True])
def test_pieces_are_those_of_the_whole_layer_whose_weights_change_on_the_way(
    family: str, fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mkaq.model.walk.TOKENS_PER_BATCH", 64)  # three batches
    walk = LayerWalk(open_checkpoint(make_model(tmp_path, family)), torch.device("cpu"), fast=fast)
    states = walk.embed(TOKENS)
    untouched, runs = states.clone(), 0
    with walk.layer(1) as layer:
        attention = layer.get_submodule("self_attn")
        attention.register_forward_pre_hook(lambda *_: count())

        def count() -> None:
            nonlocal runs
            runs += 1

        with Piecewise(walk, layer, 1, states, WRITER) as pieces:
            for group in walk.checkpoint.family.linears:
                found = torch.cat([pieces.input_of(group[0], slice(at, at + 2)) for at in (0, 2, 4)])
                layer.set_submodule("self_attn", attention)
                whole = input_of(
                    layer.get_submodule(group[0]), partial(walk.run, layer, 1, untouched.clone())
                )
                if pieces._replay is not None:
                    layer.set_submodule("self_attn", pieces._replay)
                assert torch.allclose(found, whole, rtol=2e-2 if fast else 1e-4, atol=2e-2 if fast else 1e-5)
                for name in group:
                    halve(layer, name)
            before = runs
            pieces.finish()
            assert runs == before  # the attention is not run again
        assert layer.get_submodule("self_attn") is attention
        assert torch.allclose(states, walk.run(layer, 1, untouched), rtol=1e-2, atol=5e-2 if fast else 1e-4)


def test_output_that_is_not_finite_is_an_error(tiny: Path) -> None:
    walk = LayerWalk(open_checkpoint(tiny), torch.device("cpu"))
    states = walk.embed(TOKENS)
    with walk.layer(0) as layer, torch.no_grad():
        layer.get_submodule("mlp.down_proj").weight.mul_(torch.inf)
        with (
            Piecewise(walk, layer, 0, states, WRITER) as pieces,
            pytest.raises(CheckpointError, match="layer 0 gives NaN or infinity"),
        ):
            pieces.finish()
