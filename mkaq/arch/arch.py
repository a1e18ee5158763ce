"""The names and roles of the modules of a model family."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """The role of a linear layer in a decoder layer."""

    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    ATTENTION_OUTPUT = "attention output"
    GATE = "gate"
    UP = "up"
    DOWN = "down"


ATTENTION_INPUT_ROLES = (Role.QUERY, Role.KEY, Role.VALUE)
MLP_INPUT_ROLES = (Role.GATE, Role.UP)
OUTPUT_ROLES = (Role.ATTENTION_OUTPUT, Role.DOWN)
"""The roles that write to the residual stream, in the order of the forward pass."""


@dataclass(frozen=True)
class Linear:
    """A linear layer of a decoder layer.

    Attributes:
        name: Its name, relative to the decoder layer.
        roles: Its roles. A packed layer has several; their rows lie one after another.
    """

    name: str
    roles: tuple[Role, ...]


@dataclass(frozen=True)
class Arch:
    """The module names and roles of a model family.

    Tensors on disk are named after the modules of transformers, except for those in `renamed`.

    Attributes:
        inputs: The linear layers of a decoder layer, grouped by shared input, in the order of the forward
            pass.
        attention: The attention, relative to the layer.
        mlp: The MLP, relative to the layer.
        attention_norm: The norm before the attention.
        mlp_norm: The norm before the MLP.
        written_norms: Norms between a linear layer that writes and the residual stream.
        parallel: Whether attention and MLP read the same hidden state, and their outputs are added.
        norm_offset: The norms multiply by norm_offset + weight.
        base: The model without its head.
        embed: The token embedding, relative to the base.
        layers: The decoder layers, relative to the base.
        final_norm: The norm after the last layer, relative to the base.
        head: The output layer.
        renamed: Modules with another name on disk: (module, name on disk); `""` if the name is left out.
    """

    inputs: tuple[tuple[Linear, ...], ...]
    attention: str = "self_attn"
    mlp: str = "mlp"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    written_norms: tuple[str, ...] = ()
    parallel: bool = False
    norm_offset: float = 0.0
    base: str = "model"
    embed: str = "embed_tokens"
    layers: str = "layers"
    final_norm: str = "norm"
    head: str = "lm_head"
    renamed: tuple[tuple[str, str], ...] = ()

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All linear layers of a decoder layer."""
        return tuple(linear for group in self.inputs for linear in group)

    @property
    def linear_names(self) -> tuple[str, ...]:
        """The names of all linear layers of a decoder layer."""
        return tuple(linear.name for linear in self.linears)

    @property
    def out_projs(self) -> tuple[str, ...]:
        """The linear layers that write to the residual stream: attention output, down."""
        return tuple(self.linear_of(role).name for role in OUTPUT_ROLES)

    @property
    def norm_of(self) -> Mapping[str, str]:
        """The norm before the attention and the norm before the MLP, by the name of the module."""
        return {self.attention: self.attention_norm, self.mlp: self.mlp_norm}

    @property
    def embed_weight(self) -> str:
        """The embedding's weight on disk."""
        return self.on_disk(f"{self.base}.{self.embed}.weight")

    @property
    def final_norm_weight(self) -> str:
        """The final norm's weight on disk."""
        return self.on_disk(f"{self.base}.{self.final_norm}.weight")

    @property
    def head_weight(self) -> str:
        """The output layer's weight on disk."""
        return self.on_disk(f"{self.head}.weight")

    def linear_of(self, role: Role) -> Linear:
        """The linear layer with a role."""
        return next(linear for linear in self.linears if role in linear.roles)

    def layer_name(self, index: int) -> str:
        """The name of a decoder layer on disk."""
        return self.on_disk(f"{self.base}.{self.layers}.{index}")

    def in_layer(self, index: int, name: str) -> str:
        """The name on disk of a tensor or module of a decoder layer."""
        return f"{self.layer_name(index)}.{name}"

    def split(self, name: str) -> tuple[int, str] | None:
        """Splits a tensor's name on disk into layer number and name in the layer; None outside the layers."""
        number, _, relative = name.removeprefix(self.on_disk(f"{self.base}.{self.layers}.")).partition(".")
        if (
            not relative
            or not re.fullmatch("[0-9]{1,18}", number)
            or self.in_layer(int(number), relative) != name
        ):
            return None
        return int(number), relative

    def on_disk(self, name: str) -> str:
        """The name on disk of a tensor of the module."""
        for module, stored in self.renamed:
            if name.startswith(f"{module}."):
                return f"{stored}.{name.removeprefix(f'{module}.')}".removeprefix(".")
        return name

    def in_module(self, name: str) -> str:
        """The name in the module of a tensor on disk."""
        for module, stored in sorted(self.renamed, key=lambda pair: -len(pair[1])):
            if name.startswith(f"{stored}.") or not stored:
                return f"{module}.{name.removeprefix(f'{stored}.' if stored else '')}"
        return name
