"""Whether a format can hold the linear layers of a model, checked before any work."""

from collections.abc import Mapping, Sequence
from typing import Any

from mkaq.checkpoint.reader import Checkpoint
from mkaq.errors import UnsupportedError
from mkaq.formats.runtimes import runtimes

_SIZES = (128, 64, 32, 256, 512, 1024, -1, 16)  # the usual size first


def check_gptq(source: Checkpoint, config: Mapping[str, Any]) -> None:
    """Checks, before any work, that every linear layer fits the format.

    Args:
        source: The model.
        config: The quantization_config of the quantized checkpoint.

    Raises:
        UnsupportedError: If a size is not a multiple of 32, or `group_size` does not divide it, or the output
            layer is to be quantized and is the embedding.
    """
    shapes = {name: source.linear_shape(name) for name in source.arch.linear_names}
    if config["lm_head"]:
        shapes[source.arch.head] = _head_shape(source)
    for name, (out_features, in_features) in shapes.items():
        if in_features % 32 or out_features % 32:
            raise UnsupportedError(
                f"{name} is {out_features} x {in_features}; the GPTQ format needs multiples of 32",
                where=source.path,
                fix="use quantize: {method: bitsandbytes, bits: 8}",
            )
    for name, (_, in_features) in shapes.items():
        if config["group_size"] != -1 and in_features % config["group_size"]:
            raise UnsupportedError(
                f"group_size {config['group_size']} does not divide the {in_features} inputs of {name}",
                where="quantize.group_size",
                fix=_advice(config, sorted({inputs for _, inputs in shapes.values()})),
            )


def _head_shape(source: Checkpoint) -> tuple[int, int]:
    if source.arch.head_weight not in source.dense_shapes:
        what = "its output layer is the embedding (tie_word_embeddings), of which runtimes read rows"
        fix = "leave out quantize.lm_head; in GGUF export.gguf.embedding: q8_0 or q4_0 rounds both"
        raise UnsupportedError(what, where=source.path, fix=fix)
    return source.head_shape


def check_bitsandbytes(source: Checkpoint, config: Mapping[str, Any]) -> None:
    """Checks that every linear layer runs on every CPU, where the library may need blocks of 32 rows.

    Args:
        source: The model.
        config: The quantization_config of what comes out.

    Raises:
        UnsupportedError: If the number of rows of one is no multiple of 32.
    """
    for name in source.arch.linear_names if config["load_in_4bit"] else ():
        out_features, in_features = source.linear_shape(name)
        if out_features % 32:
            raise UnsupportedError(
                f"{name} is {out_features} x {in_features}; bitsandbytes at 4 bits needs blocks of 32 rows",
                where=source.path,
                fix="use quantize: {method: bitsandbytes, bits: 8}",
            )


def _advice(config: Mapping[str, Any], inputs: Sequence[int]) -> str:
    """The group sizes that fit every layer: first those that most runtimes run, then the others."""
    refusing: dict[int, list[str]] = {}
    for size in _SIZES:
        if size == -1 or all(count % size == 0 for count in inputs):
            rows = runtimes({**config, "group_size": size})
            refusing[size] = [row.runtime for row in rows if not row.runs]
    fewest = min(map(len, refusing.values()))
    best = [size for size, names in refusing.items() if len(names) == fewest]
    advice = f"use {' or '.join(map(str, best))}"
    for size, names in refusing.items():
        if more := [name for name in names if name not in refusing[best[0]]]:
            advice += f"; {size} is not for {', '.join(more)}"
    return advice
