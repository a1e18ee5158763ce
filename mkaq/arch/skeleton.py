"""The tensors that a configuration implies, for plain and for quantized checkpoints."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mkaq.errors import CheckpointError

Shape = tuple[int, ...]


def build_skeleton(hf_config: Any) -> Any:
    """The model of transformers without weights: parameters on the meta device, buffers real.

    Rotary tables and Gemma's embedding scale are buffers, which no checkpoint holds.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with init_empty_weights(include_buffers=False), no_init_weights(), torch.no_grad():
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    model.tie_weights()
    return model.eval()


def plain_tensors(hf_config: Any) -> dict[str, Shape]:
    """Name and shape of every tensor of an unquantized checkpoint; a tied head is left out."""
    model = build_skeleton(hf_config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if hf_config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def expected_tensors(
    plain: Mapping[str, Shape], linear_names: Iterable[str], config: Mapping[str, Any] | None, where: object
) -> dict[str, Shape | None]:
    """Name and shape (None: any) of every tensor that a checkpoint must hold.

    Args:
        plain: The same without quantization, from `plain_tensors`.
        linear_names: The linear layers of a decoder layer.
        config: The checkpoint's quantization_config.
        where: Named in errors.

    Raises:
        CheckpointError: If the quantization_config is not one that can be read.
    """
    if config is None:
        return dict(plain)
    linears = set(linear_names)
    result: dict[str, Shape | None] = {}
    for name, shape in plain.items():
        found = re.fullmatch(r"model\.layers\.\d+\.(.+)\.weight", name)
        if not found or found[1] not in linears:
            result[name] = shape
        elif config["quant_method"] == "gptq":
            result.update(_gptq_tensors(name.removesuffix(".weight"), shape, config, where))
        else:
            result.update(_bitsandbytes_tensors(name, shape, config))
    return result


def _gptq_tensors(module: str, shape: Shape, config: Any, where: object) -> dict[str, Shape]:
    bits, group_size = config.get("bits"), config.get("group_size")
    if bits not in (2, 3, 4, 8) or not isinstance(group_size, int) or (group_size < 1 and group_size != -1):
        raise CheckpointError(
            f"quantization_config has bits {bits!r} and group_size {group_size!r}",
            where=where,
        )
    out_features, in_features = shape
    groups = 1 if group_size == -1 else -(-in_features // group_size)
    return {
        f"{module}.qweight": (in_features * bits // 32, out_features),
        f"{module}.qzeros": (groups, out_features * bits // 32),
        f"{module}.scales": (groups, out_features),
        f"{module}.g_idx": (in_features,),
    }


def _bitsandbytes_tensors(name: str, shape: Shape, config: Any) -> dict[str, Shape | None]:
    if config.get("load_in_8bit"):
        return {
            name: shape,
            name.removesuffix("weight") + "SCB": (shape[0],),
            name.removesuffix("weight") + "weight_format": None,
        }
    quant_type = config.get("bnb_4bit_quant_type", "fp4")
    result: dict[str, Shape | None] = {
        name: ((shape[0] * shape[1] + 1) // 2, 1),
        f"{name}.absmax": None,
        f"{name}.quant_map": (16,),
        f"{name}.quant_state.bitsandbytes__{quant_type}": None,
    }
    if config.get("bnb_4bit_use_double_quant"):
        result |= {f"{name}.nested_absmax": None, f"{name}.nested_quant_map": (256,)}
    return result
