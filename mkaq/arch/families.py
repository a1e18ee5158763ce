"""The supported model families.

A family is listed once its merge, both quantizers, export and reload are tested.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mkaq.arch.arch import Arch, Linear, Role
from mkaq.errors import UnsupportedError

_OUTPUT, _DOWN = Linear("self_attn.o_proj", (Role.ATTENTION_OUTPUT,)), Linear("mlp.down_proj", (Role.DOWN,))
_LLAMA = Arch(
    inputs=(
        (
            Linear("self_attn.q_proj", (Role.QUERY,)),
            Linear("self_attn.k_proj", (Role.KEY,)),
            Linear("self_attn.v_proj", (Role.VALUE,)),
        ),
        (_OUTPUT,),
        (Linear("mlp.gate_proj", (Role.GATE,)), Linear("mlp.up_proj", (Role.UP,))),
        (_DOWN,),
    )
)
_PHI3 = Arch(
    inputs=(
        (Linear("self_attn.qkv_proj", (Role.QUERY, Role.KEY, Role.VALUE)),),
        (_OUTPUT,),
        (Linear("mlp.gate_up_proj", (Role.GATE, Role.UP)),),
        (_DOWN,),
    )
)
_GEMMA2 = replace(
    _LLAMA,
    mlp_norm="pre_feedforward_layernorm",
    written_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    norm_offset=1.0,
)

FAMILIES: Mapping[str, Arch] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA2,
    "phi3": _PHI3,
}


def arch_of(config: Mapping[str, Any], where: object) -> Arch:
    """The names and roles of the modules of the model that a configuration describes.

    Raises:
        UnsupportedError: If its `model_type` is not in `FAMILIES`.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedError(
            f"model_type {model_type!r} is not supported",
            where=where,
            fix=f"supported families: {', '.join(FAMILIES)}",
        )
    return FAMILIES[model_type]
