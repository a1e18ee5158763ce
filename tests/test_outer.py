"""What goes before and after the layers, for families that are not in the table: other names, other parts.

GPT-NeoX: parallel layers, fused heads, norms with biases, an embedding by another name. OPT: learned
positions, a base two modules deep, a tied head.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from mkaq.arch import families
from mkaq.arch.arch import Arch, Linear, Role
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.errors import CheckpointError, UsageError
from mkaq.walk.outer import Outer
from mkaq.walk.walk import LayerWalk
from mkaq.walk.whole_model import whole_model

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
IDS = torch.randint(2, 512, (5, 24), generator=torch.Generator().manual_seed(1))
LAYERS = 3
ARCHS = {
    "gpt_neox": Arch(
        inputs=(
            (Linear("attention.query_key_value", (Role.QUERY, Role.KEY, Role.VALUE)),),
            (Linear("attention.dense", (Role.ATTENTION_OUTPUT,)),),
            (Linear("mlp.dense_h_to_4h", (Role.UP,)),),
            (Linear("mlp.dense_4h_to_h", (Role.DOWN,)),),
        ),
        attention="attention",
        parallel=True,
        base="gpt_neox",
        embed="embed_in",
        final_norm="final_layer_norm",
    ),
    "opt": Arch(
        inputs=(
            (
                Linear("self_attn.q_proj", (Role.QUERY,)),
                Linear("self_attn.k_proj", (Role.KEY,)),
                Linear("self_attn.v_proj", (Role.VALUE,)),
            ),
            (Linear("self_attn.out_proj", (Role.ATTENTION_OUTPUT,)),),
            (Linear("fc1", (Role.UP,)),),
            (Linear("fc2", (Role.DOWN,)),),
        ),
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        base="model.decoder",
        final_norm="final_layer_norm",
    ),
}
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
EXTRA = {"opt": {"ffn_dim": 128}}


@pytest.fixture(params=ARCHS)
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name = str(request.param)
    monkeypatch.setitem(families.FAMILIES, name, ARCHS[name])  # type: ignore[arg-type]
    return name


@pytest.fixture
def model(family: str) -> Any:
    """A random model, every tensor of which counts."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | EXTRA.get(family, {}))
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for tensor in made.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return made


@pytest.fixture
def folder(model: Any, tmp_path: Path) -> Path:
    """Its checkpoint. Names are the module's: transformers writes the head of GPT-NeoX as `embed_out`."""
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    model.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


class Reference:
    """The forward pass of transformers: what every layer reads and gives, and the logits."""

    @torch.no_grad()
    def __init__(self, model: Any, arch: Arch, ids: torch.Tensor) -> None:
        self.first, self.states = torch.empty(0), list[torch.Tensor]()
        layers = model.get_submodule(arch.base).get_submodule(arch.layers)
        hooks = [layer.register_forward_hook(lambda *call: self.states.append(call[2])) for layer in layers]
        hooks.append(layers[0].register_forward_pre_hook(lambda _, inputs: setattr(self, "first", inputs[0])))
        self.logits = model(ids, use_cache=False).logits
        for hook in hooks:
            hook.remove()


def outer_of(folder: Path) -> Outer:
    checkpoint = open_checkpoint(folder)
    return Outer(checkpoint, copy.deepcopy(checkpoint.hf_config), CPU, torch.float32)


def walk_over(folder: Path) -> LayerWalk:
    return LayerWalk(open_checkpoint(folder), CPU)


@torch.no_grad()
def test_walk_is_the_forward_pass_bit_for_bit(family: str, model: Any, folder: Path) -> None:
    walk = walk_over(folder)
    for ids in (IDS, IDS, IDS[:2, :7]):  # also a second time, and at another length
        expected = Reference(model, ARCHS[family], ids)
        assert torch.equal(walk.embed(ids), expected.first)
        for index, states in walk.hidden_states(ids):
            assert torch.equal(states, expected.states[index]), index
        assert index == LAYERS - 1
        with walk.head() as head:
            assert torch.equal(head(states), expected.logits)
        with walk.final_norm() as norm:
            base = model.get_submodule(ARCHS[family].base)
            assert torch.equal(norm(states), base.get_submodule(ARCHS[family].final_norm)(states))


@torch.no_grad()
def test_batches_have_no_say(family: str, model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes before the layers, and what layers are called with, is that of any batch."""
    monkeypatch.setattr("mkaq.walk.batches.TOKENS_PER_BATCH", 2 * IDS.shape[1])  # two samples, and one alone
    walk = walk_over(folder)
    expected = [Reference(model, ARCHS[family], ids) for ids in IDS.split(2)]
    assert torch.equal(walk.embed(IDS), torch.cat([batch.first for batch in expected]))
    for index, states in walk.hidden_states(IDS):
        assert torch.equal(states, torch.cat([batch.states[index] for batch in expected])), index
    with walk.head() as head:
        logits = torch.cat([head(rows) for rows in states.split(2)])
    assert torch.equal(logits, torch.cat([batch.logits for batch in expected]))


@torch.no_grad()
def test_whole_model_is_the_model(model: Any, folder: Path) -> None:
    loaded = whole_model(open_checkpoint(folder), CPU, torch.float32)
    assert torch.equal(loaded(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)
    assert loaded.state_dict().keys() == model.state_dict().keys()


@torch.no_grad()
def test_embedding_reads_no_other_rows(family: str, model: Any, folder: Path) -> None:
    used, places = torch.unique(IDS, return_inverse=True)
    outer = outer_of(folder)
    with outer.embedding(used) as embed:
        found = embed(places)
        assert outer.skeleton.get_input_embeddings().weight.shape == (len(used), SIZES["hidden_size"])
    assert torch.equal(found, Reference(model, ARCHS[family], IDS).first)


def on_meta(outer: Outer) -> Iterator[bool]:
    for module in (outer.skeleton, *outer.layers):
        yield from (tensor.is_meta for tensor in module.parameters())


@torch.no_grad()
def test_weights_are_gone_where_they_are_not_in_use(family: str, folder: Path) -> None:
    outer = outer_of(folder)
    arch, names = ARCHS[family], {name for name, _ in outer.skeleton.named_modules()}
    ids = torch.zeros(1, 4, dtype=torch.int64)
    assert len(outer.layers) == LAYERS and all(on_meta(outer))
    with outer.embedding(torch.arange(3)) as embed:
        states = embed(ids)
        assert not all(on_meta(outer))
    assert all(on_meta(outer))
    assert len(outer.arguments(4)) == LAYERS and all(on_meta(outer))
    with outer.final_norm():
        assert not all(on_meta(outer))
    assert all(on_meta(outer))
    with outer.head() as head:
        head(states)
    assert all(on_meta(outer))
    assert {name for name, _ in outer.skeleton.named_modules()} == names
    assert len(outer.skeleton.get_submodule(arch.base).get_submodule(arch.layers)) == 0


def test_error_in_the_middle_puts_the_model_back(folder: Path) -> None:
    outer = outer_of(folder)
    names = {name for name, _ in outer.skeleton.named_modules()}
    with pytest.raises(ZeroDivisionError), outer.head():
        raise ZeroDivisionError
    assert {name for name, _ in outer.skeleton.named_modules()} == names and all(on_meta(outer))


def test_arguments_go_with_any_batch(folder: Path) -> None:
    for arguments in outer_of(folder).arguments(6):
        tensors = [value for value in tree_leaves(arguments) if isinstance(value, torch.Tensor)]
        assert tensors and all(tensor.shape[0] == 1 for tensor in tensors)


def test_more_tokens_than_positions(folder: Path) -> None:
    longer = torch.zeros(1, SIZES["max_position_embeddings"] + 1, dtype=torch.int64)
    with pytest.raises(UsageError, match="33 tokens are longer than the model's 32 positions"):
        walk_over(folder).embed(longer)
    assert walk_over(folder).embed(longer[:, 1:]).shape == (1, 32, 64)


def test_token_without_a_row(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="token 512, the model knows 512 tokens"):
        walk_over(folder).embed(torch.tensor([[1, 512]]))
