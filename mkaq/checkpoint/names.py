"""The likely cause when a checkpoint's tensor names are not those of a causal language model."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mkaq.errors import CheckpointError

_FROM_LANGUAGE_MODEL = "start from the causal language model that it was made from"
_KINDS = (  # (pattern of a tensor name, what has such names, what to do)
    (
        r"base_model\.model\.|.*\.lora_[AB]\.",
        "an adapter (LoRA)",
        "merge it into its base model (merge_and_unload of peft) and save that",
    ),
    (
        r"module\.|_orig_mod\.|_forward_module\.",
        "a model in a wrapper (data parallel, compiled)",
        "take the model out of its wrapper and save it again",
    ),
    (
        r"layers\.\d+\.(attention|feed_forward)\.w|tok_embeddings\.",
        "the original format of Llama and Mistral, not Hugging Face's",
        "take the model in Hugging Face format, or convert it",
    ),
    (
        r"(model\.)?(vision|visual|audio|language_model|multi_modal)\w*\.",
        "a model of more than text",
        "mkaq takes text-only models",
    ),
)
_QUANTIZED = r".*\.(qweight|weight_packed|SCB|absmax)$"
_HEAD = r"(score|classifier|classification_head|qa_outputs|v_head|value_head|reward_head)\."
_BASE = r"(layers\.\d+|embed_tokens|norm)\."


def wrong_names(names: Iterable[str], config: Mapping[str, Any], default: CheckpointError) -> CheckpointError:
    """The error for tensors that do not fit config.json, with the likely cause if the names show it.

    Args:
        names: The names of all tensors of the checkpoint.
        config: config.json.
        default: The error if the names show no cause.
    """
    ordered = sorted(names)

    def first(pattern: str) -> str | None:
        return next((name for name in ordered if re.match(pattern, name)), None)

    def explained(name: str, kind: str, fix: str) -> CheckpointError:
        message = f"{default.what}: {name} is a name of {kind}"
        return CheckpointError(message, where=default.where, fix=fix)

    for pattern, kind, fix in _KINDS:
        if name := first(pattern):
            return explained(name, kind, fix)
    if config.get("quantization_config") is None and (name := first(_QUANTIZED)):
        kind = "quantized weights, and config.json has no quantization_config"
        return explained(name, kind, "start from the original weights, or restore the quantization_config")
    if name := first(_HEAD):
        classes = config.get("architectures")
        listed = f" ({', '.join(map(str, classes))[:100]})" if isinstance(classes, list) and classes else ""
        kind = f"a classifier{listed}, which has no output layer over the vocabulary"
        return explained(name, kind, _FROM_LANGUAGE_MODEL)
    if name := first(_BASE):
        kind = "a base model without a head (such as LlamaModel), in which `model.` is left out"
        if config.get("tie_word_embeddings"):
            fix = "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(another) puts it right"
            return explained(name, kind, fix)
        return explained(name, f"{kind}; the output layer is not here", _FROM_LANGUAGE_MODEL)
    return default
