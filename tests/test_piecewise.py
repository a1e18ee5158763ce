"""A layer run in pieces reads, and gives, what it does when it is run from its start."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from mkaq.checkpoint.validate import open_checkpoint
from mkaq.errors import CheckpointError
from mkaq.walk.hooks import input_of
from mkaq.walk.piecewise import Piecewise
from mkaq.walk.walk import LayerWalk
from tests.tiny import FAMILIES, make_model

TOKENS = torch.randint(2, 4096, (6, 32), generator=torch.Generator().manual_seed(1))


def halve(layer: nn.Module, name: str) -> None:
    linear = layer.get_submodule(name)
    linear.weight = nn.Parameter(linear.weight * 0.5, requires_grad=False)


def inputs_from_the_start(
    walk: LayerWalk, layer: nn.Module, name: str, states: torch.Tensor, whole: dict[str, nn.Module]
) -> torch.Tensor:
    """What a linear layer reads when the whole layer is run, whatever stands in its parts' places."""
    instead = {part: layer.get_submodule(part) for part in whole}
    for part, module in whole.items():
        layer.set_submodule(part, module)
    found = input_of(layer.get_submodule(name), partial(walk.run, layer, 1, states))
    for part, module in instead.items():
        layer.set_submodule(part, module)
    return found


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fast", [False, True])
def test_pieces_are_those_of_the_whole_layer_whose_weights_change_on_the_way(
    family: str, fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mkaq.walk.batches.TOKENS_PER_BATCH", 64)  # three batches
    walk = LayerWalk(
        open_checkpoint(make_model(tmp_path, family)),
        torch.device("cpu"),
        torch.bfloat16 if fast else torch.float32,
    )
    states = walk.embed(TOKENS)
    untouched, close = states.clone(), 2e-2 if fast else 1e-4
    before_mlp = "pre_feedforward_layernorm" if family == "gemma2" else "post_attention_layernorm"
    norms = ("input_layernorm", before_mlp)
    with walk.layer(1) as layer:
        calls: list[str] = []
        for name in (*walk.checkpoint.arch.linear_names, *norms):
            layer.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
        whole = {name: layer.get_submodule(name) for name in ("self_attn", "mlp", *norms)}
        with Piecewise(walk, layer, 1, states) as pieces:
            for inputs in walk.checkpoint.arch.inputs:
                group = [linear.name for linear in inputs]
                found = torch.cat([pieces.input_of(group[0], slice(at, at + 2)) for at in (0, 2, 4)])
                expected = inputs_from_the_start(walk, layer, group[0], untouched, whole)
                assert torch.allclose(found, expected, rtol=close, atol=close)
                for name in group:
                    halve(layer, name)
            middle = pieces.input_of("post_attention_layernorm", slice(0, 2))
            assert torch.equal(middle, pieces.input_of("post_attention_layernorm", slice(0, 2)))
            before = len(calls)
            pieces.finish()
            assert calls[before:] == ["mlp.down_proj"] * 3  # nothing else is run again
        assert all(layer.get_submodule(name) is module for name, module in whole.items())
        assert torch.allclose(states, walk.run(layer, 1, untouched), rtol=1e-2, atol=5e-2 if fast else 1e-4)


def test_output_that_is_not_finite_is_an_error(tiny: Path) -> None:
    walk = LayerWalk(open_checkpoint(tiny), torch.device("cpu"))
    states = walk.embed(TOKENS)
    with walk.layer(0) as layer, torch.no_grad():
        layer.get_submodule("mlp.down_proj").weight.mul_(torch.inf)
        with (
            Piecewise(walk, layer, 0, states) as pieces,
            pytest.raises(CheckpointError, match="layer 0 gives NaN or infinity"),
        ):
            pieces.finish()
