"""GGUF, which llama.cpp and what is built on it read: one file, with the tokenizer inside.

GPTQ's codes become blocks that decode to the same numbers; nothing is quantized again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkaq.arch.config import Sizes
from mkaq.errors import UnsupportedError, UsageError
from mkaq.export.folder import refuse
from mkaq.export.gguf_blocks import exact_type
from mkaq.export.gguf_metadata import ARCHITECTURES, add_config, unfit
from mkaq.export.settings import Settings

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from mkaq.checkpoint.reader import Checkpoint
    from mkaq.export.gguf_tensors import Planned

NAME = "gguf"
_ZERO_POINTS = "8-bit codes with zero points (sym: false) need 9 bits, which no GGUF type has"


def refusal(model: Checkpoint, quantization: Mapping[str, Any] | None) -> str:
    """Why a GGUF file cannot hold a model, or llama.cpp would compute or tokenize in another way.

    Raises:
        UsageError: If the package that writes it is missing.
    """
    return _unfit_model(model, quantization) or _unfit_tokenizer(model)


def _unfit_model(model: Checkpoint, quantization: Mapping[str, Any] | None) -> str:
    if find_spec("gguf") is None:
        fix = "pip install 'mkaq[gguf]'; in a checkout, pip install -e '.[gguf]'"
        raise UsageError("is written and read by the package gguf", where="export.formats: gguf", fix=fix)
    if reason := unfit(model.config["model_type"], model.hf_config):
        return reason
    return _unfit_codes(quantization, model.sizes)


def _unfit_codes(quantization: Mapping[str, Any] | None, sizes: Sizes) -> str:
    if quantization is None:
        return ""
    if quantization.get("quant_method") != "gptq":
        return f"codes of {quantization.get('quant_method')} fit no GGUF type; those of gptq do"
    bits, group, sym = quantization["bits"], quantization["group_size"], quantization.get("sym", True)
    if quantization.get("desc_act") and not quantization.get("static_groups"):
        return "the columns of a group lie together there: desc_act needs static_groups"
    if bits == 8 and not sym:
        return _ZERO_POINTS
    if group != -1 and group % 32:
        return f"group_size {group} is no multiple of 32, the columns of a GGUF block"
    for columns in (sizes.hidden, sizes.heads * sizes.head_dim, sizes.intermediate):
        if exact_type(bits, sym, group, columns) is None:
            return f"a row of {columns} weights with group_size {group} fits no GGUF blocks"
    return ""


def _unfit_tokenizer(model: Checkpoint) -> str:
    import gguf

    from mkaq.export.gguf_tokenizer import add_tokenizer

    try:
        add_tokenizer(gguf.GGUFWriter(None, "llama"), model.path, model.sizes.vocabulary)
    except UnsupportedError as error:
        return error.what
    return ""


def write(model: Checkpoint, folder: Path, settings: Settings) -> None:
    """Writes one file, named after the artifact; arguments and errors as in `mkaq.export.formats`."""
    writer, tensors = _described(model, settings)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, *_place(tensor), tensor.kind)
    writer.write_header_to_file(folder / _file(settings))
    try:
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor.make())
    finally:
        writer.close()


def _place(tensor: Planned) -> tuple[tuple[int, ...], Any, int]:
    """Shape, dtype and size of a tensor's bytes."""
    import numpy as np
    from gguf import quant_shape_to_byte_shape

    shape = quant_shape_to_byte_shape(tensor.shape, tensor.kind)
    return shape, np.dtype(np.uint8), int(np.prod(shape))


def _described(model: Checkpoint, settings: Settings) -> tuple[GGUFWriter, list[Planned]]:
    """A writer with all metadata, and the tensors to come."""
    refuse(_unfit_model(model, model.quantization), NAME, model)  # its tokenizer is read below
    import gguf

    from mkaq.export.gguf_tensors import planned
    from mkaq.export.gguf_tokenizer import add_tokenizer
    from mkaq.formats.gguf_types import file_type

    tensors = list(planned(model, settings.gguf))
    writer = gguf.GGUFWriter(None, ARCHITECTURES[model.config["model_type"]])
    writer.add_type("model")
    add_config(writer, model.hf_config)
    linear = next(tensor.kind for tensor in tensors if ".attn_output.weight" in tensor.name)
    writer.add_file_type(file_type(linear))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    words = add_tokenizer(writer, model.path, model.sizes.vocabulary)
    writer.add_name(_name(settings.name, words.strips))
    if base := settings.base_model:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base.rpartition("/")[2])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")
    return writer, tensors


def _name(name: str, strips: bool) -> str:
    """A name that has "phi-3" in it if added tokens strip, and else does not: llama.cpp goes by that."""
    if strips:
        return name if re.search("phi-?3", name, re.IGNORECASE) else f"{name} (phi-3)"
    return re.sub("(phi)-?(3)", r"\1 \2", name, flags=re.IGNORECASE)


def check(model: Checkpoint, folder: Path, settings: Settings) -> Iterator[str]:
    """Yields a sentence for each difference between a file and the checkpoint that it was made from."""
    from mkaq.export.gguf_check import faults

    writer, tensors = _described(model, settings)
    yield from faults(folder / _file(settings), writer.kv_data[0], tensors)


def _file(settings: Settings) -> str:
    return f"{settings.name}.gguf"
