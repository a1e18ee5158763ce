"""A model configuration as the metadata of a GGUF file; what llama.cpp lacks is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mkaq.arch.config import Sizes

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter
    from numpy.typing import NDArray

ARCHITECTURES: Mapping[str, str] = {  # model_type and llama.cpp's name, which decides how the graph is built
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
}
_WHY_NOT = {
    "gemma2": "llama.cpp lets every second layer of Gemma2 attend to a window, and that order is lost when "
    "layers are merged; a GGUF cannot name the layers",
}
_ROPES = {
    "default": ARCHITECTURES,
    "linear": ARCHITECTURES,
    "llama3": ("llama",),
    "longrope": ("phi3",),
    "yarn": ARCHITECTURES,
}
_YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "truncate": True,
}  # llama.cpp's, and transformers' where none is set
_SIZES = (
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
)
_PLAIN_HEADS = ("qwen2", "phi3")  # their heads' sizes always add up to the hidden size there


def unfit(model_type: str, config: Any) -> str:
    """Why llama.cpp would not compute what a model computes; empty if it would.

    Args:
        model_type: Its family.
        config: transformers' configuration object.
    """
    if model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        return _WHY_NOT.get(model_type, f"model_type {model_type} was not tried there (tried: {known})")
    sizes = Sizes.of(config)
    if getattr(config, "hidden_act", "silu") not in ("silu", "swish"):
        return f"llama.cpp computes {model_type} with silu, not with hidden_act {config.hidden_act}"
    if model_type in _PLAIN_HEADS and sizes.heads * sizes.head_dim != sizes.hidden:
        return f"llama.cpp's {model_type} has no head_dim of its own ({sizes.head_dim})"
    if model_type == "qwen3" and getattr(config, "attention_bias", False):
        return "llama.cpp's qwen3 has no attention_bias"
    return _unfit_rope(model_type, config)


def _unfit_rope(model_type: str, config: Any) -> str:
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default") if "rope_theta" in rope else "per layer"
    if ARCHITECTURES[model_type] not in [ARCHITECTURES[name] for name in _ROPES.get(kind, ())]:
        return f"rope_type {kind} of {model_type} is not known to be the same in llama.cpp"
    other = [key for key, value in rope.items() if key not in _SIZES and value not in (None, _YARN.get(key))]
    if kind == "yarn" and (other or not rope.get("original_max_position_embeddings")):
        missing = ", ".join(other) or "no original_max_position_embeddings"
        return f"rope_type yarn was tried there with its defaults only, not with {missing}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and model_type != "phi3":
        return f"llama.cpp rotates whole heads of {model_type}, partial_rotary_factor says otherwise"
    return ""


def window(config: Any) -> int | None:
    """Positions that a token attends to in layers with a window; None if every layer attends to all."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    size = getattr(config, "sliding_window", None)
    return None if size is None else int(size)


def rotary_size(config: Any) -> int:
    """Columns of a head that are rotated."""
    return int(Sizes.of(config).head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))


def add_config(writer: GGUFWriter, config: Any) -> None:
    """Adds the keys that say how the model computes.

    None of these architectures has a window in llama.cpp (Phi3's is read and ignored). Within the window's
    length full attention is the same, so that is the length of the context.

    Args:
        writer: Where they go.
        config: transformers' configuration object, which `unfit` has accepted.
    """
    sizes, rope, near = Sizes.of(config), config.rope_parameters, window(config)
    writer.add_vocab_size(sizes.vocabulary)
    writer.add_context_length(min(sizes.positions, near or sizes.positions))
    writer.add_embedding_length(sizes.hidden)
    writer.add_block_count(int(config.num_hidden_layers))
    writer.add_feed_forward_length(sizes.intermediate)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.kv_heads)
    writer.add_key_length(sizes.head_dim)
    writer.add_value_length(sizes.head_dim)
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_rope_dimension_count(rotary_size(config))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if near and config.model_type == "phi3":
        writer.add_sliding_window(near)
    _add_scaling(writer, config)


def _add_scaling(writer: GGUFWriter, config: Any) -> None:
    from gguf import RopeScalingType

    rope = config.rope_parameters
    match rope.get("rope_type", "default"):
        case "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(rope["factor"]))
        case "yarn":
            writer.add_rope_scaling_type(RopeScalingType.YARN)
            writer.add_rope_scaling_factor(float(rope["factor"]))
            writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
        case "longrope":
            writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
            writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
            writer.add_rope_scaling_attn_factors(_library(config)[1])


def rope_factors(config: Any) -> dict[str, NDArray[np.float32]]:
    """Tensors that llama.cpp divides the angles by, each of shape (rotary size / 2,)."""
    import numpy as np

    rope = config.rope_parameters
    match rope.get("rope_type", "default"):
        case "llama3":
            size = rotary_size(config)
            plain = float(rope["rope_theta"]) ** -(np.arange(0, size, 2) / size)
            return {"rope_freqs.weight": (plain / _library(config)[0]).astype(np.float32)}
        case "longrope":
            return {
                f"rope_factors_{length}.weight": np.array(rope[f"{length}_factor"], np.float32)
                for length in ("long", "short")
            }
    return {}


def _library(config: Any) -> tuple[NDArray[np.float64], float]:
    """transformers' inverse frequencies, and the factor of its cosines and sines."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    compute = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]]
    frequencies, factor = compute(config, torch.device("cpu"))
    return frequencies.double().numpy(), float(factor)
