"""Layers and sizes in a model configuration, and the configuration of a model that lost layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mkaq.errors import CheckpointError, UnsupportedError

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


@dataclass(frozen=True)
class Sizes:
    """The sizes in a model configuration."""

    hidden: int
    intermediate: int
    vocabulary: int
    positions: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> "Sizes":
        """Reads the sizes from a configuration object of transformers."""
        heads = int(config.num_attention_heads)
        return cls(
            hidden=int(config.hidden_size),
            intermediate=int(config.intermediate_size),
            vocabulary=int(config.vocab_size),
            positions=int(config.max_position_embeddings),
            heads=heads,
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        )


def layer_count(config: Mapping[str, Any], where: object) -> int:
    """The number of decoder layers.

    Raises:
        CheckpointError: If `num_hidden_layers` is not an integer from 1 to 4096.
    """
    count = config.get("num_hidden_layers")
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= 4096:
        raise CheckpointError(f"num_hidden_layers is {count!r}, not a number of layers", where=where)
    return count


def keep_layers(
    config: Mapping[str, Any], resolved: Mapping[str, Any], kept: Sequence[int], where: object
) -> dict[str, Any]:
    """The configuration of a model that has only the layers `kept`, in this order.

    Every per-layer list is sliced and written out, even if config.json leaves it out: several families would
    otherwise derive the pattern from the new number of layers.

    Args:
        config: config.json of the source, unchanged.
        resolved: The same with the defaults of transformers filled in.
        kept: For each new layer, the old layer whose position (attention type) it takes.
        where: The file to name in errors.

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
