"""How a quantized checkpoint stores its weights, from its `quantization_config`: read, never assumed.

What mkaq would read wrongly is refused: the tensors of another variant have the same names and shapes.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mkaq.errors import CheckpointError, UnsupportedError

_MUST_BE_OFF = {  # of GPTQ: what it means where it is on
    "dynamic": "settings of their own for some modules",
    "lm_head": "a quantized output layer",
    "rotation": "rotated weights",
    "adapter": "an adapter beside the weights",
    "is_marlin_format": "weights laid out for the Marlin kernel",
}
_GPTQ_FORMATS = ("gptq", "gptq_v2")
_SKIPPED = ("llm_int8_skip_modules", "modules_to_not_convert")


def gptq_format(config: Mapping[str, Any]) -> str:
    """`gptq`, whose zero points are stored minus one, or `gptq_v2`, where they are stored as they are.

    Args:
        config: A quantization_config that `check_quantization` has passed.
    """
    return str(config.get("checkpoint_format") or config.get("format") or "gptq")


def check_quantization(config: Mapping[str, Any], linear_names: Iterable[str], where: object) -> None:
    """Refuses what mkaq does not read, or would read wrongly.

    Args:
        config: The quantization_config of a checkpoint.
        linear_names: The linear layers of a decoder layer.
        where: Named in errors.

    Raises:
        UnsupportedError: If it is another method, or a variant of one.
        CheckpointError: If it contradicts itself.
    """
    method = config.get("quant_method")
    if method not in ("gptq", "bitsandbytes"):
        raise UnsupportedError(f"quantization {str(method)[:40]!r} is not supported", where=where)
    if method == "gptq":
        _check_gptq(config, set(linear_names), where)
    else:
        _check_bitsandbytes(config, list(linear_names), where)


def _check_gptq(config: Mapping[str, Any], linear_names: set[str], where: object) -> None:
    named = [config[key] for key in ("checkpoint_format", "format") if config.get(key)]
    if len({str(name) for name in named}) > 1:
        raise CheckpointError(
            f"quantization_config says checkpoint_format {named[0]!r} and format {named[1]!r}", where=where
        )
    if gptq_format(config) not in _GPTQ_FORMATS:
        raise _unsupported(f"checkpoint_format {gptq_format(config)!r}", where)
    if config.get("method") not in (None, "gptq"):
        raise _unsupported(f"method {config['method']!r}", where)
    if _type_name(config.get("pack_dtype")) not in ("None", "int32"):
        raise _unsupported(f"pack_dtype {config['pack_dtype']!r}", where)
    for key, meaning in _MUST_BE_OFF.items():
        if config.get(key):
            raise _unsupported(f"{key} ({meaning})", where)
    listed = config.get("modules_in_block_to_quantize")
    if listed and not linear_names <= set(re.findall(r"\w+\.\w+", str(listed))):
        raise _unsupported("modules_in_block_to_quantize (some layers left dense)", where)


def _check_bitsandbytes(config: Mapping[str, Any], linear_names: list[str], where: object) -> None:
    if bool(config.get("load_in_8bit")) == bool(config.get("load_in_4bit")):
        raise CheckpointError("quantization_config must say either load_in_8bit or load_in_4bit", where=where)
    if _type_name(config.get("bnb_4bit_quant_storage")) not in ("None", "uint8"):
        raise _unsupported(f"bnb_4bit_quant_storage {config['bnb_4bit_quant_storage']!r}", where)
    if config.get("llm_int8_has_fp16_weight"):
        raise _unsupported("llm_int8_has_fp16_weight", where)
    for key in _SKIPPED:
        skipped = config.get(key) or []
        for name in skipped if isinstance(skipped, list) else [skipped]:
            if _may_be_a_linear(str(name), linear_names):
                raise _unsupported(f"{key} with {str(name)[:60]!r} (some layers left dense)", where)


def _may_be_a_linear(name: str, linear_names: list[str]) -> bool:
    """Whether an entry of a list of modules can mean a linear layer of a decoder layer.

    Libraries take entries as beginnings, endings or regular expressions of whole names.
    """
    below = name.removeprefix("model").removeprefix(".")
    if not re.fullmatch(r"[\w.]+", below) or below.split(".")[0] == "layers":
        return True
    return any(linear.endswith(below) or f"{below}." in f"{linear}." for linear in linear_names)


def _type_name(value: object) -> str:
    return str(value).removeprefix("torch.")


def _unsupported(what: str, where: object) -> UnsupportedError:
    return UnsupportedError(
        f"quantization_config has {what}, which mkaq does not read",
        where=where,
        fix="load it with the library that wrote it, or start from the original weights",
    )
