"""Names and roles of a family's modules: both ways between module and disk, and true of the model's code."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from mkaq.arch.arch import ATTENTION_INPUT_ROLES, MLP_INPUT_ROLES, OUTPUT_ROLES, Arch, Linear, Role
from mkaq.arch.config import Sizes
from mkaq.arch.families import FAMILIES
from mkaq.arch.skeleton import build_skeleton, dense_tensors
from mkaq.checkpoint.validate import open_checkpoint
from tests.runs import ROOT
from tests.tiny import FAMILIES as TINY
from tests.tiny import make_model

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.randint(2, 4096, (2, 12), generator=torch.Generator().manual_seed(1))
LLAMA = FAMILIES["llama"]
BARE = replace(
    LLAMA,
    base="transformer",
    embed="wte",
    layers="h",
    final_norm="ln_f",
    renamed=(("transformer", ""), ("lm_head", "lm_head")),
)
MOVED = replace(LLAMA, base="model.decoder", renamed=(("model.decoder", "decoder"), ("lm_head", "output")))
NAMES: list[tuple[Arch, str, str]] = [  # in the module, on disk
    (LLAMA, "model.embed_tokens.weight", "model.embed_tokens.weight"),
    (LLAMA, "model.layers.11.mlp.up_proj.weight", "model.layers.11.mlp.up_proj.weight"),
    (LLAMA, "model.norm.weight", "model.norm.weight"),
    (LLAMA, "lm_head.weight", "lm_head.weight"),
    (BARE, "transformer.wte.weight", "wte.weight"),
    (BARE, "transformer.wpe.weight", "wpe.weight"),
    (BARE, "transformer.h.11.mlp.up_proj.bias", "h.11.mlp.up_proj.bias"),
    (BARE, "transformer.ln_f.bias", "ln_f.bias"),
    (BARE, "lm_head.weight", "lm_head.weight"),
    (BARE, "lm_head.bias", "lm_head.bias"),
    (MOVED, "model.decoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    (MOVED, "model.decoder.layers.0.mlp.up_proj.weight", "decoder.layers.0.mlp.up_proj.weight"),
    (MOVED, "model.decoder.norm.weight", "decoder.norm.weight"),
    (MOVED, "lm_head.weight", "output.weight"),
    (MOVED, "lm_head.bias", "output.bias"),
]


@pytest.fixture(scope="module", params=TINY)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("arch") / family, family, 2)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# --- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "module", "disk"), NAMES)
def test_names_go_both_ways(arch: Arch, module: str, disk: str) -> None:
    assert arch.on_disk(module) == disk and arch.in_module(disk) == module


@pytest.mark.parametrize(
    ("arch", "embed", "norm", "head", "layer"),
    [
        (LLAMA, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.7"),
        (BARE, "wte.weight", "ln_f.weight", "lm_head.weight", "h.7"),
        (MOVED, "decoder.embed_tokens.weight", "decoder.norm.weight", "output.weight", "decoder.layers.7"),
    ],
)
def test_tensors_that_are_asked_for_by_what_they_are(
    arch: Arch, embed: str, norm: str, head: str, layer: str
) -> None:
    assert (arch.embed_weight, arch.final_norm_weight, arch.head_weight) == (embed, norm, head)
    assert arch.layer_name(7) == layer and arch.in_layer(7, "mlp.up_proj") == f"{layer}.mlp.up_proj"
    assert all(arch.split(name) is None for name in (embed, norm, head, layer, f"{layer}."))


@pytest.mark.parametrize("arch", [LLAMA, BARE, MOVED])
@pytest.mark.parametrize("index", [0, 3, 10, 4095])
def test_split_undoes_in_layer(arch: Arch, index: int) -> None:
    for below in ("mlp.up_proj.weight", "input_layernorm.weight", "layers.2.weight"):
        assert arch.split(arch.in_layer(index, below)) == (index, below)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "1.a",
        "layers.1.a",
        "amodel.layers.1.a",
        "model.layers1.a",
        "model.layers..a",
        "model.layers.1",
        "model.layers.01.a",
        "model.layers.-1.a",
        "model.layers.a.1",
        "model.layers.\u0661.a",
        "model.layers.1\u00b2.a",
    ],
)
def test_what_only_looks_like_a_layer(name: str) -> None:
    assert LLAMA.split(name) is None


def test_names_are_those_that_transformers_writes_and_has(family: str, folder: Path) -> None:
    checkpoint, arch = open_checkpoint(folder), FAMILIES[family]
    assert dense_tensors(checkpoint.hf_config, arch).keys() == checkpoint.tensors.keys()
    in_module = build_skeleton(checkpoint.hf_config).state_dict()
    for name in in_module:
        assert arch.in_module(arch.on_disk(name)) == name
    assert {arch.in_module(name) for name in checkpoint.tensors} <= in_module.keys()
    tied = arch.head_weight not in checkpoint.tensors
    assert {arch.embed_weight, arch.final_norm_weight} <= checkpoint.tensors.keys()
    assert tied == checkpoint.hf_config.tie_word_embeddings
    for index in range(2):
        weights = {arch.in_layer(index, f"{name}.weight") for name in arch.linear_names}
        assert weights <= set(checkpoint.layer_tensor_names(index))
        below = {name.removeprefix(f"{arch.layer_name(index)}.") for name in checkpoint.names_by_layer[index]}
        assert checkpoint.read_layer(index).keys() == below


# --- roles -------------------------------------------------------------------------------------


def test_every_role_is_had_once_by_one_linear_layer(family: str) -> None:
    arch = FAMILIES[family]
    roles = [role for linear in arch.linears for role in linear.roles]
    assert sorted(roles) == sorted(Role)
    assert all(role in arch.linear_of(role).roles for role in Role)
    assert arch.linear_names == tuple(linear.name for group in arch.inputs for linear in group)


def test_writers() -> None:
    assert OUTPUT_ROLES == (Role.ATTENTION_OUTPUT, Role.DOWN)
    assert set(ATTENTION_INPUT_ROLES + MLP_INPUT_ROLES + OUTPUT_ROLES) == set(Role)
    for arch in FAMILIES.values():
        assert arch.out_projs == ("self_attn.o_proj", "mlp.down_proj")
    other = replace(LLAMA, inputs=((Linear("b", (Role.DOWN,)), Linear("a", (Role.ATTENTION_OUTPUT,))),))
    assert other.out_projs == ("a", "b")  # in the order of the forward pass, not of the names


def test_fused_linear_layers_have_several_roles() -> None:
    phi3 = FAMILIES["phi3"]
    assert phi3.linear_of(Role.KEY) == Linear("self_attn.qkv_proj", (Role.QUERY, Role.KEY, Role.VALUE))
    assert phi3.linear_of(Role.UP) == Linear("mlp.gate_up_proj", (Role.GATE, Role.UP))
    assert LLAMA.linear_of(Role.UP) == Linear("mlp.up_proj", (Role.UP,))


def test_roles_tell_the_sizes(family: str, folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    sizes: Sizes = checkpoint.sizes
    heads, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    rows = {Role.QUERY: heads, Role.KEY: keys, Role.VALUE: keys}
    rows |= dict.fromkeys(MLP_INPUT_ROLES, sizes.intermediate) | dict.fromkeys(OUTPUT_ROLES, sizes.hidden)
    columns = {Role.ATTENTION_OUTPUT: heads, Role.DOWN: sizes.intermediate}
    for linear in FAMILIES[family].linears:
        shape = checkpoint.tensors[checkpoint.arch.in_layer(1, f"{linear.name}.weight")].shape
        inputs = columns.get(linear.roles[0], sizes.hidden)
        assert shape == (sum(rows[role] for role in linear.roles), inputs), linear


# --- what the forward pass does ----------------------------------------------------------------


@contextmanager
def noted(layer: nn.Module, names: list[str]) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """What submodules read and give, in the order of their calls."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    handles = []
    for name in names:

        def note(_: nn.Module, inputs: Any, output: torch.Tensor, name: str = name) -> None:
            seen[name] = inputs[0], output

        handles.append(layer.get_submodule(name).register_forward_hook(note))
    yield seen
    for handle in handles:
        handle.remove()


@torch.no_grad()
def test_linear_layers_of_a_group_read_the_same_and_groups_are_in_order(family: str, folder: Path) -> None:
    model, arch = load(folder), FAMILIES[family]
    layer = model.get_submodule(arch.base).get_submodule(arch.layers)[1]
    norms = [*arch.norm_of.values(), *arch.written_norms]
    with noted(layer, [*arch.linear_names, *norms]) as seen:
        model(IDS, use_cache=False)
    for group in arch.inputs:
        assert len({id(seen[linear.name][0]) for linear in group}) == 1
    assert len({id(seen[group[0].name][0]) for group in arch.inputs}) == len(arch.inputs)
    called = [name for name in seen if name in arch.linear_names]
    places = {linear.name: at for at, group in enumerate(arch.inputs) for linear in group}
    assert [places[name] for name in called] == sorted(places.values())
    readers = {arch.attention: ATTENTION_INPUT_ROLES, arch.mlp: MLP_INPUT_ROLES}
    for part, norm in arch.norm_of.items():
        for role in readers[part]:
            name = arch.linear_of(role).name
            assert name.startswith(f"{part}.") and torch.equal(seen[name][0], seen[norm][1])
    for writer, norm in zip(arch.out_projs, arch.written_norms, strict=False):
        assert torch.equal(seen[norm][0], seen[writer][1])
    assert len(arch.written_norms) in (0, len(arch.out_projs))


@torch.no_grad()
def test_what_writes_adds_to_the_residual_stream(family: str, folder: Path) -> None:
    """A layer whose writers give nothing hands on what it reads."""
    model, arch = load(folder), FAMILIES[family]
    layer = model.get_submodule(arch.base).get_submodule(arch.layers)[1]
    for name in arch.out_projs:
        layer.get_submodule(name).weight.zero_()
    read: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    given: list[Any] = []
    layer.register_forward_hook(lambda *call: given.append(call[2]))
    model(IDS, use_cache=False)
    assert torch.equal(given[0], read[0])


@torch.no_grad()
def test_norms_multiply_by_the_offset_plus_their_weight(family: str, folder: Path) -> None:
    model, arch = load(folder), FAMILIES[family]
    norm = model.get_submodule(arch.base).get_submodule(arch.final_norm)
    states = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    norm.weight.fill_(1 - arch.norm_offset)
    assert torch.allclose(norm(states), states * states.square().mean(-1, keepdim=True).rsqrt(), atol=1e-4)


# --- where this is known -----------------------------------------------------------------------


def test_names_of_layers_are_known_in_one_place() -> None:
    mkaq = ROOT / "mkaq"
    files = [path for path in mkaq.rglob("*.py") if mkaq / "arch" not in path.parents]
    assert mkaq / "walk" / "walk.py" in files and mkaq / "arch" / "arch.py" not in files
    assert not [str(path) for path in files if "model.layers" in path.read_text(encoding="utf-8")]
