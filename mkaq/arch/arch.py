"""What mkaq must know of a model family: the names of its modules, and what each of them is for."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What a linear layer of a decoder layer does."""

    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    ATTENTION_OUTPUT = "attention output"
    GATE = "gate"
    UP = "up"
    DOWN = "down"


READ_BY_ATTENTION = (Role.QUERY, Role.KEY, Role.VALUE)
READ_BY_MLP = (Role.GATE, Role.UP)
WRITERS = (Role.ATTENTION_OUTPUT, Role.DOWN)
"""What writes to the residual stream, in the order of the forward pass."""


@dataclass(frozen=True)
class Linear:
    """A linear layer of a decoder layer.

    Attributes:
        name: Below the layer.
        roles: Of a fused one several, whose rows lie one after another.
    """

    name: str
    roles: tuple[Role, ...]


@dataclass(frozen=True)
class Arch:
    """The names and roles of a family's modules.

    Tensors on disk are named after the modules of transformers, but for `renamed`.

    Attributes:
        inputs: The linear layers of a decoder layer, grouped by the input that they share, in the order in
            which the forward pass reaches them.
        attention: The attention, below the layer.
        mlp: The MLP, below the layer.
        attention_norm: What the attention reads comes from it.
        mlp_norm: What the MLP reads comes from it.
        written_norms: Norms between what a layer writes and the residual stream.
        parallel: Whether attention and MLP read the same hidden state, and their outputs are added.
        norm_offset: Its norms multiply by this plus their weight.
        base: The model without its head.
        embed: The token embedding, below the base.
        layers: The decoder layers, below the base.
        final_norm: The norm after the last layer, below the base.
        head: The output layer.
        renamed: Modules that have another name on disk, `""` for none: (module, name on disk).
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
        """Their names."""
        return tuple(linear.name for linear in self.linears)

    @property
    def writers(self) -> tuple[str, ...]:
        """The names of those that write to the residual stream: attention output, down."""
        return tuple(self.linear_of(role).name for role in WRITERS)

    @property
    def norm_of(self) -> Mapping[str, str]:
        """For the attention and for the MLP the norm from which it reads."""
        return {self.attention: self.attention_norm, self.mlp: self.mlp_norm}

    @property
    def embed_weight(self) -> str:
        """The embedding's tensor on disk."""
        return self.on_disk(f"{self.base}.{self.embed}.weight")

    @property
    def final_norm_weight(self) -> str:
        """The final norm's tensor on disk."""
        return self.on_disk(f"{self.base}.{self.final_norm}.weight")

    @property
    def head_weight(self) -> str:
        """The output layer's tensor on disk."""
        return self.on_disk(f"{self.head}.weight")

    def linear_of(self, role: Role) -> Linear:
        """The linear layer that has a role."""
        return next(linear for linear in self.linears if role in linear.roles)

    def layer_name(self, index: int) -> str:
        """A decoder layer, as its tensors on disk name it."""
        return self.on_disk(f"{self.base}.{self.layers}.{index}")

    def in_layer(self, index: int, name: str) -> str:
        """A tensor or a module of a decoder layer, as it is named on disk."""
        return f"{self.layer_name(index)}.{name}"

    def split(self, name: str) -> tuple[int, str] | None:
        """The decoder layer of a tensor on disk, and its name below it; None if it is of no layer."""
        number, _, below = name.removeprefix(self.on_disk(f"{self.base}.{self.layers}.")).partition(".")
        if not below or not re.fullmatch("[0-9]{1,9}", number) or self.in_layer(int(number), below) != name:
            return None
        return int(number), below

    def on_disk(self, name: str) -> str:
        """The name on disk of a tensor of the module."""
        for module, other in self.renamed:
            if name.startswith(f"{module}."):
                return f"{other}.{name.removeprefix(f'{module}.')}".removeprefix(".")
        return name

    def in_module(self, name: str) -> str:
        """The name in the module of a tensor on disk."""
        for module, other in sorted(self.renamed, key=lambda pair: -len(pair[1])):
            if name.startswith(f"{other}.") or not other:
                return f"{module}.{name.removeprefix(f'{other}.' if other else '')}"
        return name
