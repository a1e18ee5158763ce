"""Heads and channels of real decoder layers: taken, exchanged, and put behind another layer's norm."""

from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mkaq.arch.config import Sizes
from mkaq.arch.families import FAMILIES
from mkaq.arch.parts import Parts, attention_parts, mlp_parts
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.merge.parts import all_parts, fold_norm, part_columns, take_columns, take_parts
from mkaq.walk.hooks import input_of
from mkaq.walk.walk import LayerWalk
from tests.tiny import make_model

Tensors = dict[str, torch.Tensor]
WalkOf = Callable[[str], LayerWalk]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),  # biases of q, k and v
    "qwen3": ("qwen3", {}),  # heads that are wider than hidden_size / heads, with norms of their own
    "phi3": ("phi3", {}),  # fused
}
each_kind = pytest.mark.parametrize("kind", list(KINDS))


@pytest.fixture(scope="module")
def walk_of(tmp_path_factory: pytest.TempPathFactory) -> WalkOf:
    """Two random layers with three KV groups of two heads."""

    @cache
    def make(kind: str) -> LayerWalk:
        family, changes = KINDS[kind]
        shape = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 64}
        folder = make_model(tmp_path_factory.mktemp("parts") / "model", family, 2, **shape | changes)
        return LayerWalk(open_checkpoint(folder), torch.device("cpu"))

    return make


def parts_of(walk: LayerWalk) -> tuple[Parts, Parts]:
    arch, sizes = walk.checkpoint.arch, walk.checkpoint.sizes
    return attention_parts(arch, sizes), mlp_parts(arch, sizes)


def layers_of(walk: LayerWalk) -> list[Tensors]:
    return [{name: tensor.float() for name, tensor in walk.layer_tensors(i).items()} for i in range(2)]


def states() -> torch.Tensor:
    return torch.randn(2, 12, 96, generator=torch.Generator().manual_seed(7))


def run(walk: LayerWalk, tensors: Tensors) -> torch.Tensor:
    return walk.run(walk.assemble(0, tensors), 0, states())


def written_from(walk: LayerWalk, tensors: Tensors, parts: Parts) -> torch.Tensor:
    """What a layer hands to `o_proj` or `down_proj`."""
    module = walk.assemble(0, tensors)
    return input_of(module.get_submodule(parts.out_proj), partial(walk.run, module, 0, states()))


def readers_of(layer: Tensors, parts: Parts) -> Tensors:
    return {key: tensor for key, tensor in layer.items() if key.rpartition(".")[0] in parts.in_projs}


def shuffled(parts: Parts) -> torch.Tensor:
    """All parts of the first layer, none in its place."""
    return all_parts(1, parts).roll(1, 0)


@each_kind
def test_all_parts_of_a_layer_are_the_layer(kind: str, walk_of: WalkOf) -> None:
    walk = walk_of(kind)
    layers = layers_of(walk)
    for parts in parts_of(walk):
        everything = all_parts(2, parts)
        assert everything.shape == (2 * parts.count, 2)
        for index, layer in enumerate(layers):
            origins = everything[index * parts.count : (index + 1) * parts.count]
            taken, expected = take_parts(layers, parts, origins), readers_of(layer, parts)
            assert taken.keys() == expected.keys() and len(taken) >= len(parts.in_projs)
            assert all(torch.equal(taken[key], expected[key]) for key in expected)
            assert torch.equal(take_columns(layers, parts, origins), layer[f"{parts.out_proj}.weight"])


@each_kind
@torch.no_grad()
def test_order_of_parts_does_not_matter_to_the_layer(kind: str, walk_of: WalkOf) -> None:
    walk = walk_of(kind)
    layer = layers_of(walk)[0]
    before = run(walk, layer)
    for parts in parts_of(walk):
        moved = take_parts([layer], parts, shuffled(parts))
        assert all(not torch.equal(moved[key], layer[key]) for key in moved)
        writer = {f"{parts.out_proj}.weight": take_columns([layer], parts, shuffled(parts))}
        assert torch.allclose(run(walk, layer | moved | writer), before, atol=1e-4)
        assert not torch.allclose(run(walk, layer | moved), before, atol=1e-2)
        assert not torch.allclose(run(walk, layer | writer), before, atol=1e-2)


@each_kind
@torch.no_grad()
def test_parts_of_two_layers_write_what_each_wrote(kind: str, walk_of: WalkOf) -> None:
    """At the same hidden state, and behind the first layer's norm."""
    walk = walk_of(kind)
    first, second = layers_of(walk)
    for parts in parts_of(walk):
        candidates = [fold_norm(layer, parts, first, torch.float32) for layer in (first, second)]
        everything = torch.cat([written_from(walk, first | c, parts) for c in candidates], -1)
        origins = torch.stack([torch.arange(parts.count) % 2, torch.arange(parts.count).flip(0)], 1)
        mixed = written_from(walk, first | take_parts(candidates, parts, origins), parts)
        assert torch.allclose(mixed, everything[..., part_columns(parts, origins)], atol=1e-4)
        assert not torch.allclose(mixed, everything[..., : mixed.shape[-1]], atol=1e-2)


@each_kind
@torch.no_grad()
def test_folded_layer_gives_the_same_behind_another_norm(kind: str, walk_of: WalkOf) -> None:
    walk = walk_of(kind)
    layer = layers_of(walk)[0]
    generator = torch.Generator().manual_seed(3)
    norms = {parts.norm: torch.rand(96, generator=generator) + 0.5 for parts in parts_of(walk)}
    kept = layer | {f"{norm}.weight": weight for norm, weight in norms.items()}
    folded = dict(kept)
    for parts in parts_of(walk):
        new = fold_norm(layer, parts, kept, torch.float32)
        assert new.keys() == readers_of(layer, parts).keys()
        assert all(torch.equal(new[key], layer[key]) for key in new if key.endswith("bias"))
        folded |= new
    assert torch.allclose(run(walk, folded), run(walk, layer), atol=1e-4)
    assert not torch.allclose(run(walk, kept), run(walk, layer), atol=1e-2)


def test_behind_its_own_norm_nothing_changes_and_zeros_stay_finite(walk_of: WalkOf) -> None:
    walk = walk_of("qwen2")
    layer = layers_of(walk)[0]
    parts = parts_of(walk)[0]
    own = fold_norm(layer, parts, layer, torch.bfloat16)
    assert all(tensor.dtype == torch.bfloat16 for tensor in own.values())
    assert all(torch.equal(own[key].float(), layer[key]) for key in own)
    silent = layer[f"{parts.norm}.weight"].clone()
    silent[5] = 0
    folded = fold_norm(layer, parts, layer | {f"{parts.norm}.weight": silent}, torch.float32)
    weight, before = folded["self_attn.q_proj.weight"], layer["self_attn.q_proj.weight"]
    assert (weight[:, 5] == 0).all()
    assert torch.equal(weight[:, 6:], before[:, 6:]) and torch.equal(weight[:, :5], before[:, :5])


def sizes(**changes: Any) -> Sizes:
    """Three KV groups of two heads of four, six channels."""
    shape = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 6}
    shape |= {"vocab_size": 8, "max_position_embeddings": 8}
    return Sizes.of(SimpleNamespace(**shape | changes))


def numbered(rows: int, start: int) -> torch.Tensor:
    return torch.arange(start, start + rows)[:, None]


def test_rows_of_split_layers() -> None:
    parts = attention_parts(FAMILIES["llama"], sizes())
    names = {"self_attn.q_proj": 24, "self_attn.k_proj": 12, "self_attn.v_proj": 12}
    layers = [{f"{name}.weight": numbered(rows, start) for name, rows in names.items()} for start in (0, 100)]
    taken = take_parts(layers, parts, torch.tensor([[1, 2], [0, 1]]))
    assert taken["self_attn.q_proj.weight"][:, 0].tolist() == [*range(116, 124), *range(8, 16)]
    for name in ("k", "v"):
        assert taken[f"self_attn.{name}_proj.weight"][:, 0].tolist() == [*range(108, 112), *range(4, 8)]
    assert part_columns(parts, torch.tensor([[1, 2], [0, 1]])).tolist() == [*range(40, 48), *range(8, 16)]


def test_rows_of_fused_layers() -> None:
    phi3 = FAMILIES["phi3"]
    heads, channels = attention_parts(phi3, sizes()), mlp_parts(phi3, sizes())
    names = {"self_attn.qkv_proj": 48, "mlp.gate_up_proj": 12}
    layers = [{f"{name}.weight": numbered(rows, start) for name, rows in names.items()} for start in (0, 100)]
    taken = take_parts(layers, heads, torch.tensor([[1, 2], [0, 1]]))["self_attn.qkv_proj.weight"]
    assert taken[:, 0].tolist() == [
        *range(116, 124), *range(8, 16), *range(132, 136), *range(28, 32), *range(144, 148), *range(40, 44)
    ]  # fmt: skip
    taken = take_parts(layers, channels, torch.tensor([[0, 5], [1, 1]]))["mlp.gate_up_proj.weight"]
    assert taken[:, 0].tolist() == [5, 101, 11, 107]


def test_head_size_is_the_configured_one_if_there_is_one() -> None:
    llama = FAMILIES["llama"]
    assert attention_parts(llama, sizes()).width == 8
    assert attention_parts(llama, sizes(head_dim=None)).width == 8
    assert attention_parts(llama, sizes(head_dim=10)).width == 20
