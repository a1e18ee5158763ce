"""The baselines of the benchmarks, on models of which it is known what each must remove."""

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks import baselines
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.evaluate.perplexity import perplexity
from mkaq.progress import Progress
from mkaq.walk.walk import LayerWalk
from tests.tiny import FAMILIES, make_model

Tensors = dict[str, torch.Tensor]


def edit(folder: Path, change: Callable[[Tensors], None]) -> LayerWalk:
    """A walk over a model whose weights are changed first."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return walk_over(folder)


def walk_over(folder: Path) -> LayerWalk:
    return LayerWalk(open_checkpoint(folder), torch.device("cpu"))


def idle(folder: Path, layers: Iterable[int], family: str = "llama") -> LayerWalk:
    """A random model of 6 layers, of which some do nothing."""

    def silence(weights: Tensors) -> None:
        for index in layers:
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                weights[f"model.layers.{index}.{name}.weight"].zero_()

    return edit(make_model(folder, family, layers=6), silence)


def random_tokens(samples: int = 8, length: int = 32) -> torch.Tensor:
    return torch.randint(2, 4096, (samples, length), generator=torch.Generator().manual_seed(1))


def own_text(folder: Path) -> torch.Tensor:
    """What a model finds most likely, so that it fares worse without any layer that does something."""
    model, tokens = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), random_tokens(4, 2)
    for _ in range(22):
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits[:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    return tokens


def measure(folder: Path) -> float:
    return perplexity(walk_over(folder), random_tokens(4).tolist(), Progress(quiet=True)).perplexity


def test_reverse_order_drops_the_deepest() -> None:
    assert baselines.reverse_order(6, 2) == [0, 1, 2, 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_shortgpt_finds_idle_layers(family: str, tmp_path: Path) -> None:
    walk = idle(tmp_path / "model", (1, 4), family)
    assert baselines.shortgpt(walk, random_tokens(), 2) == [0, 2, 3, 5]


@pytest.mark.parametrize("family", FAMILIES)
def test_contiguous_finds_an_idle_block_and_the_model_stays_the_same(family: str, tmp_path: Path) -> None:
    walk = idle(tmp_path / "model", (2, 3), family)
    kept = baselines.contiguous(walk, random_tokens(), 2)
    assert kept == [0, 1, 4, 5]
    source, smaller = walk.checkpoint, tmp_path / "smaller"
    baselines.write_checkpoint(source, baselines.kept_layers(walk, kept), smaller, source.dtype)
    assert measure(smaller) == pytest.approx(measure(tmp_path / "model"), rel=1e-6)


def test_contiguous_looks_at_last_tokens_only(tmp_path: Path) -> None:
    walk, tokens = idle(tmp_path / "model", ()), random_tokens()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    model.model.norm = torch.nn.Identity()
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True, use_cache=False).hidden_states
    for row in range(len(tokens)):  # in some of them the other tokens say otherwise
        last = [state[row, -1] for state in states]
        angles = [torch.cosine_similarity(last[at], last[at + 1], dim=0).arccos().item() for at in range(6)]
        closest = angles.index(min(angles))
        kept = baselines.contiguous(walk, tokens[row : row + 1], 1)
        assert kept == [index for index in range(6) if index != closest]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_sleb_removes_idle_layers_first(family: str, tmp_path: Path) -> None:
    walk = idle(tmp_path / "model", (1, 4), family)
    assert baselines.sleb(walk, own_text(tmp_path / "model"), 2) == [1, 4]


def test_sleb_is_the_greedy_search(tmp_path: Path) -> None:
    walk, tokens = idle(tmp_path / "model", ()), random_tokens(4, 16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    layers, order = list(model.model.layers), list[int]()

    def loss_without(*gone: int) -> float:
        model.model.layers = torch.nn.ModuleList(layers[i] for i in range(6) if i not in gone)
        with torch.no_grad():
            return model(tokens, labels=tokens, use_cache=False).loss.item()

    for _ in range(3):
        left = [index for index in range(6) if index not in order]
        order.append(min(left, key=lambda index: loss_without(*order, index)))
    assert baselines.sleb(walk, tokens, 3) == order


def test_laco_layer_is_the_sum_of_differences() -> None:
    tensors = {old: {"weight": torch.randn(3, 5), "norm.weight": torch.randn(5)} for old in (4, 5, 6, 7)}
    weights = baselines.laco_weights([{4: 1.0}, {5: 1.0}, {6: 1.0}, {7: 1.0}])
    merged = baselines.laco_layer(tensors, weights)
    for name, first in tensors[4].items():
        expected = first + sum(tensors[old][name] - first for old in (5, 6, 7))
        torch.testing.assert_close(merged[name], expected)
    assert weights == {4: -2.0, 5: 1.0, 6: 1.0, 7: 1.0}
    again = baselines.laco_layer(tensors, baselines.laco_weights([{4: 1.0}, {5: -1.0, 6: 1.0, 7: 1.0}]))
    nested = tensors[5]["weight"] + sum(tensors[old]["weight"] - tensors[5]["weight"] for old in (6, 7))
    torch.testing.assert_close(again["weight"], nested)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_laco_collapses_what_leaves_the_output_alone(family: str, tmp_path: Path) -> None:
    idle(tmp_path / "model", (2, 3), family)

    def copy_layer(weights: Tensors) -> None:
        for name in [name for name in weights if name.startswith("model.layers.2.")]:
            weights[name.replace(".2.", ".3.", 1)] = weights[name].clone()

    walk = edit(tmp_path / "model", copy_layer)
    groups = baselines.laco(walk, random_tokens(), 2, together=3)
    assert groups == [{0: 1.0}, {1: 1.0}, {2: -1.0, 3: 1.0, 4: 1.0}, {5: 1.0}]
    source, smaller = walk.checkpoint, tmp_path / "smaller"
    baselines.write_checkpoint(source, baselines.laco_layers(walk, groups), smaller, source.dtype)
    assert open_checkpoint(smaller).num_layers == 4
    assert measure(smaller) == pytest.approx(measure(tmp_path / "model"), rel=1e-6)


def test_laco_walks_down_and_takes_no_more_than_it_needs() -> None:
    tried: list[list[int]] = []

    def similarity(groups: Sequence[baselines.Weights]) -> float:
        tried.append(next(list(group) for group in groups if len(group) > 1))
        return 0.9 if tried[-1][0] in (2, 4) else 0.5

    groups, rejected = baselines._collapse(similarity, 8, 3, 0.8, together=3, interval=2, lowest=1)
    assert tried == [[5, 6, 7], [4, 5, 6], [2, 3]]
    assert groups == [{0: 1.0}, {1: 1.0}, {2: 0.0, 3: 1.0}, {4: -1.0, 5: 1.0, 6: 1.0}, {7: 1.0}]
    assert rejected == 0.5


def test_laco_makes_the_one_merge_that_changes_the_output_least(tmp_path: Path) -> None:
    walk, tokens = idle(tmp_path / "model", ()), random_tokens()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    layers = list(model.model.layers)

    def representation() -> torch.Tensor:
        with torch.no_grad():
            return model.model(tokens, use_cache=False).last_hidden_state.flatten(1)

    original, scores = representation(), {}
    for at in (1, 2, 3):
        parts = {old: layers[old].state_dict() for old in range(at, at + 3)}
        merged = copy.deepcopy(layers[at])
        merged.load_state_dict(baselines.laco_layer(parts, {at: -1.0, at + 1: 1.0, at + 2: 1.0}))
        model.model.layers = torch.nn.ModuleList([*layers[:at], merged, *layers[at + 3 :]])
        scores[at] = torch.cosine_similarity(original, representation()).mean().item()
    groups = baselines.laco(walk, tokens, 2, together=3)
    assert [min(group) for group in groups if len(group) > 1] == [max(scores, key=scores.__getitem__)]


def test_laco_relaxes_until_enough_layers_are_gone(tmp_path: Path) -> None:
    walk, tokens = idle(tmp_path / "model", ()), random_tokens(2)
    for removed in (1, 2, 3, 4):
        groups = baselines.laco(walk, tokens, removed, together=3)
        assert len(groups) == 6 - removed
        assert [old for group in groups for old in group] == list(range(6))
        assert all(sum(group.values()) == 1 for group in groups)
    with pytest.raises(ValueError, match="cannot remove 3 of 6"):
        baselines.laco(walk, tokens, 3, lowest=3)


@pytest.mark.parametrize(("family", "start"), [("llama", 1), ("phi3", 2), ("llama", 4)])
def test_replaceme_leaves_the_mlp_before_an_idle_block_alone(family: str, start: int, tmp_path: Path) -> None:
    walk = idle(tmp_path / "model", (start, start + 1), family)
    kept, changed = baselines.replaceme(walk, random_tokens(), 2)
    assert kept == [index for index in range(6) if index not in (start, start + 1)]
    assert list(changed) == [start - 1]
    before = walk.layer_tensors(start - 1)["mlp.down_proj.weight"].float()
    torch.testing.assert_close(changed[start - 1]["mlp.down_proj.weight"], before, rtol=0, atol=1e-4)
    source, smaller = walk.checkpoint, tmp_path / "smaller"
    baselines.write_checkpoint(source, baselines.kept_layers(walk, kept, changed), smaller, torch.float32)
    assert measure(smaller) == pytest.approx(measure(tmp_path / "model"), rel=1e-4)


def test_replaceme_is_the_least_squares_fit_of_the_block(tmp_path: Path) -> None:
    walk, tokens = idle(tmp_path / "model", ()), random_tokens()
    kept, changed = baselines.replaceme(walk, tokens, 2)
    [(before, tensors)] = changed.items()
    assert kept == [index for index in range(6) if index not in (before + 1, before + 2)]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    seen: dict[str, torch.Tensor] = {}
    modules = {"mlp": model.model.layers[before].mlp, "layer": model.model.layers[before]}
    for name, module in {**modules, "block": model.model.layers[before + 2]}.items():
        module.register_forward_hook(lambda *call, name=name: seen.update({name: call[2].double()}))
    with torch.no_grad():
        model(tokens, use_cache=False)
    mlp, layer, block = (seen[name].flatten(0, 1) for name in ("mlp", "layer", "block"))
    transform = torch.linalg.lstsq(mlp, block - (layer - mlp)).solution
    expected = transform.T @ modules["mlp"].down_proj.weight.detach().double()
    assert not torch.allclose(transform, torch.eye(64).double(), atol=0.1)
    torch.testing.assert_close(tensors["mlp.down_proj.weight"], expected.float(), rtol=1e-3, atol=1e-4)


def test_replaceme_refuses_a_norm_after_the_mlp(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="norm after it"):
        baselines.replaceme(idle(tmp_path / "model", (), "gemma2"), random_tokens(), 1)
