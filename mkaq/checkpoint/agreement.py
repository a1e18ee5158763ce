"""Where a checkpoint says one thing twice: the two are compared, and never one of them taken in silence.

What has one answer whatever config.json says is not compared: types (`dtype`, `torch_dtype`) and sizes
(`total_size` of the index) are those of the tensors, as their headers have them.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mkaq.checkpoint.reader import Checkpoint
from mkaq.dtypes import FLOATS
from mkaq.errors import CheckpointError

_OF_GPTQ = ("bits", "group_size", "sym", "desc_act", "checkpoint_format")


def check_agreement(config: Mapping[str, Any], beside: Mapping[str, Any] | None, where: Path) -> None:
    """Refuses a config.json that says two things about the model, or another than quantize_config.json.

    Args:
        config: config.json.
        beside: quantize_config.json of a checkpoint with GPTQ weights, if there is one.
        where: The path of config.json.

    Raises:
        CheckpointError: If two statements differ.
    """
    _check_class(config, where)
    _check_rope(config, where)
    inside = config.get("quantization_config")
    if inside is not None and beside is not None:
        for key in _OF_GPTQ:
            if key in inside and key in beside and inside[key] != beside[key]:
                raise _differ(
                    f"quantization_config.{key}",
                    inside[key],
                    f"{key} of quantize_config.json",
                    beside[key],
                    where,
                )


def _check_class(config: Mapping[str, Any], where: Path) -> None:
    """Some libraries choose the model's code by `architectures`, others by `model_type`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    named, implied = config.get("architectures"), CLASSES.get(config["model_type"])
    for name in named if isinstance(named, list) else []:
        if str(name).endswith("ForCausalLM") and implied and str(name).lower() != implied.lower():
            raise _differ("architectures", name, "model_type", config["model_type"], where)


def _check_rope(config: Mapping[str, Any], where: Path) -> None:
    """The rotary embedding: `rope_parameters`, or `rope_theta` and `rope_scaling` as it was written before.

    transformers takes `rope_scaling` in the place of all of `rope_parameters`, its `rope_theta` included.
    """
    new, scaling = config.get("rope_parameters"), config.get("rope_scaling") or {}
    if not isinstance(new, dict) or not isinstance(scaling, dict):
        return
    old = {"rope_theta": config.get("rope_theta"), **scaling}
    for key in ("rope_theta", *sorted(scaling)):
        first, second = old[key], new.get(key)
        if first != second and second is not None and (first is not None or scaling):
            raise _differ(key, first, f"rope_parameters.{key}", second, where)


def _differ(one: str, value: object, other: str, other_value: object, where: Path) -> CheckpointError:
    return CheckpointError(
        f"{one} is {str(value)[:60]!r}, {other} says {str(other_value)[:60]!r}",
        where=where,
        fix="correct the one that is wrong",
    )


def settle_head(checkpoint: Checkpoint) -> Checkpoint:
    """Drops a stored output layer that is the embedding once more; unties one that is not.

    `tie_word_embeddings` says that the output layer is the embedding; a head of its own among the tensors
    says that it is not, and is what transformers then uses.

    Raises:
        CheckpointError: If either cannot be read.
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
    """Whether two tensors are the same, piece by piece."""
    first, second = checkpoint.tensors[one], checkpoint.tensors[other]
    if (first.dtype, first.shape) != (second.dtype, second.shape) or first.dtype not in FLOATS:
        return False
    pairs = zip(checkpoint.blocks(one), checkpoint.blocks(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
