"""The model families that mkaq knows, and what dropping layers does to their configuration.

An explicit table: a family is listed when its merge, both quantizers, export and reload are tested.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mkaq.errors import CheckpointError, UnsupportedError


@dataclass(frozen=True)
class Family:
    """What mkaq must know of a model family.

    Attributes:
        linears: The linear layers of a decoder layer, grouped by the input that they share, in
            the order in which the forward pass reaches them.
        norm_offset: Its norms multiply by this plus their weight.
    """

    linears: tuple[tuple[str, ...], ...]
    norm_offset: float = 0.0

    @property
    def linear_names(self) -> tuple[str, ...]:
        """All linear layers of a decoder layer."""
        return tuple(name for group in self.linears for name in group)


_SPLIT = Family(
    linears=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )
)
_FUSED = Family(
    linears=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",))
)

FAMILIES: Mapping[str, Family] = {
    "llama": _SPLIT,
    "mistral": _SPLIT,
    "qwen2": _SPLIT,
    "qwen3": _SPLIT,
    "gemma2": replace(_SPLIT, norm_offset=1.0),
    "phi3": _FUSED,
}

LAYER_PREFIX = "model.layers."
FINAL_NORM = "model.norm.weight"
PER_LAYER_LISTS = frozenset({"layer_types", "mlp_layer_types", "no_rope_layers", "layer_rope_theta"})
_CANNOT_SLICE = (
    "first_k_dense_replace",
    "mlp_only_layers",
    "num_kv_shared_layers",
    "cross_attention_layers",
    "attn_layer_indices",
    "full_attn_idxs",
)
_NOT_PER_LAYER = frozenset({"architectures", "eos_token_id", "bos_token_id", "pad_token_id"})


def family_of(config: Mapping[str, Any], where: object) -> Family:
    """The family of a configuration.

    Raises:
        UnsupportedError: If it is none of `FAMILIES`.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedError(
            f"model_type {model_type!r} is not supported",
            where=where,
            fix=f"supported families: {', '.join(FAMILIES)}",
        )
    return FAMILIES[model_type]


def layer_count(config: Mapping[str, Any], where: object) -> int:
    """The number of decoder layers.

    Raises:
        CheckpointError: If the configuration has no sensible one.
    """
    count = config.get("num_hidden_layers")
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= 4096:
        raise CheckpointError(f"num_hidden_layers is {count!r}, not a number of layers", where=where)
    return count


def keep_layers(
    config: Mapping[str, Any], resolved: Mapping[str, Any], kept: Sequence[int], where: object
) -> dict[str, Any]:
    """The configuration of the model that has only the layers `kept`, in this order.

    Every per-layer list is sliced and written out, also one that config.json left implicit:
    several families rebuild the pattern from the new number of layers otherwise.

    Args:
        config: config.json of the source, as it stands.
        resolved: The same with the library's defaults filled in.
        kept: For each new layer the old layer whose place (attention type) it takes.
        where: Named in errors.

    Raises:
        UnsupportedError: If the configuration has a per-layer setting that cannot be sliced.
    """
    count = layer_count(config, where)
    for key in _CANNOT_SLICE:
        if config.get(key):
            raise UnsupportedError(
                f"{key} ties layers to their positions; such a model cannot lose layers", where=where
            )
    result = dict(config)
    result["num_hidden_layers"] = len(kept)
    for key, value in {**resolved, **config}.items():
        if key in PER_LAYER_LISTS and value is not None:
            if not isinstance(value, list) or len(value) != count:
                raise CheckpointError(
                    f"{key} does not have one entry for each of the {count} layers", where=where
                )
            result[key] = [value[index] for index in kept]
        elif isinstance(value, list) and len(value) == count > 1 and key not in _NOT_PER_LAYER:
            raise UnsupportedError(f"{key} looks like a per-layer list that mkaq does not know", where=where)
    if isinstance(config.get("max_window_layers"), int):
        result["max_window_layers"] = sum(index < config["max_window_layers"] for index in kept)
    return result
