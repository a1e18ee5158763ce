"""Checks that a checkpoint does not contradict itself where it states something twice.

Statements that mkaq never uses are not compared: dtypes (`dtype`, `torch_dtype`) and sizes (`total_size` of
the index) always come from the tensor headers.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mkaq.checkpoint.reader import Checkpoint
from mkaq.dtypes import FLOATS
from mkaq.errors import CheckpointError

_GPTQ_KEYS = ("bits", "group_size", "sym", "desc_act", "checkpoint_format")


def check_agreement(
    config: Mapping[str, Any], quantize_config: Mapping[str, Any] | None, where: Path
) -> None:
    """Refuses a config.json that contradicts itself or quantize_config.json.

    Args:
        config: config.json.
        quantize_config: quantize_config.json of a checkpoint with GPTQ weights, if there is one.
        where: The path of config.json.

    Raises:
        CheckpointError: If two statements differ.
    """
    _check_class(config, where)
    _check_rope(config, where)
    inside = config.get("quantization_config")
    if inside is not None and quantize_config is not None:
        for key in _GPTQ_KEYS:
            if key in inside and key in quantize_config and inside[key] != quantize_config[key]:
                raise _contradiction(
                    f"quantization_config.{key}",
                    inside[key],
                    f"{key} of quantize_config.json",
                    quantize_config[key],
                    where,
                )


def _check_class(config: Mapping[str, Any], where: Path) -> None:
    """Compares `architectures` with `model_type`: libraries choose the model's code by one or the other."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    named, implied = config.get("architectures"), CLASSES.get(config["model_type"])
    for name in named if isinstance(named, list) else []:
        if str(name).endswith("ForCausalLM") and implied and str(name).lower() != implied.lower():
            raise _contradiction("architectures", name, "model_type", config["model_type"], where)


def _check_rope(config: Mapping[str, Any], where: Path) -> None:
    """Compares `rope_parameters` with `rope_theta` and `rope_scaling`, the older way to configure RoPE.

    In transformers `rope_scaling` replaces all of `rope_parameters`, including its `rope_theta`.
    """
    new, scaling = config.get("rope_parameters"), config.get("rope_scaling") or {}
    if not isinstance(new, dict) or not isinstance(scaling, dict):
        return
    old = {"rope_theta": config.get("rope_theta"), **scaling}
    for key in ("rope_theta", *sorted(scaling)):
        first, second = old[key], new.get(key)
        if first != second and second is not None and (first is not None or scaling):
            raise _contradiction(key, first, f"rope_parameters.{key}", second, where)


def _contradiction(one: str, value: object, other: str, other_value: object, where: Path) -> CheckpointError:
    return CheckpointError(
        f"{one} is {str(value)[:60]!r}, {other} says {str(other_value)[:60]!r}",
        where=where,
        fix="correct the one that is wrong",
    )


def settle_head(checkpoint: Checkpoint) -> Checkpoint:
    """Drops a stored output layer that equals the embedding; unties one that differs from it.

    `tie_word_embeddings` says that the output layer is the embedding. If the checkpoint stores another output
    layer all the same, transformers uses that one.

    Raises:
        CheckpointError: If a tensor cannot be read.
    """
    tensors, embedding, head = checkpoint.tensors, checkpoint.arch.embed_weight, checkpoint.arch.head_weight
    if not checkpoint.hf_config.tie_word_embeddings or head not in tensors or embedding not in tensors:
        return checkpoint
    if _same(checkpoint, embedding, head):
        return replace(checkpoint, tensors={k: v for k, v in tensors.items() if k != head})
    remark = f"{head} is not the embedding, though config.json ties them: it is kept, and they are untied"
    return replace(
        checkpoint,
        config={**checkpoint.config, "tie_word_embeddings": False},
        remarks=(*checkpoint.remarks, remark),
    )


def _same(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two tensors are equal, compared block by block."""
    first, second = checkpoint.tensors[one], checkpoint.tensors[other]
    if (first.dtype, first.shape) != (second.dtype, second.shape) or first.dtype not in FLOATS:
        return False
    pairs = zip(checkpoint.blocks(one), checkpoint.blocks(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
