"""GGUF, which llama.cpp and what is built on it read: one file, with the tokenizer inside.

GPTQ's codes become blocks that decode to the same numbers; nothing is quantized again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mkaq.arch.config import Sizes
from mkaq.errors import UnsupportedError
from mkaq.export.gguf_blocks import exact_type
from mkaq.export.gguf_metadata import ARCHITECTURES, add_config, unfit

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from mkaq.checkpoint.reader import Checkpoint
    from mkaq.export.gguf_tensors import Options, Planned

NAME = "gguf"
FILE = "model.gguf"
_ZERO_POINTS = "8-bit codes with zero points (sym: false) need 9 bits, which no GGUF type has"


class About(NamedTuple):
    """What a GGUF file says of its origin.

    Attributes:
        name: The model's name.
        base_model: The hub id of the model that it was made from; empty if not known.
        license: The name of its licence; empty if not known.
    """

    name: str
    base_model: str = ""
    license: str = ""


def refusal(model_type: str, quantization: Mapping[str, Any] | None, config: Any = None) -> str:
    """Why a GGUF cannot hold a model; empty if it can, as far as its configuration tells.

    Args:
        model_type: Its family.
        quantization: Its quantization_config; None for a dense model.
        config: transformers' configuration object, if it is known.
    """
    if find_spec("gguf") is None:
        return "it needs the package gguf: pip install 'mkaq[gguf]'"
    return unfit(model_type, config) or _unfit_codes(quantization, config)


def _unfit_codes(quantization: Mapping[str, Any] | None, config: Any) -> str:
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
    if config is not None:
        sizes = Sizes.of(config)
        for columns in (sizes.hidden, sizes.heads * sizes.head_dim, sizes.intermediate):
            if exact_type(bits, sym, group, columns) is None:
                return f"a row of {columns} weights with group_size {group} fits no GGUF blocks"
    return ""


def write(model: Checkpoint, folder: Path, about: About, options: Options | None = None) -> None:
    """Writes `FILE`.

    Args:
        model: The final checkpoint, dense or GPTQ.
        folder: An empty folder.
        about: The model's origin.
        options: The types of what is not GPTQ.

    Raises:
        UnsupportedError: If a GGUF cannot hold the model exactly, or llama.cpp would tokenize in another way.
        CheckpointError: If the model is damaged.
    """
    writer, tensors = _described(model, about, options)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, *_place(tensor), tensor.kind)
    writer.write_header_to_file(folder / FILE)
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


def _described(model: Checkpoint, about: About, options: Options | None) -> tuple[GGUFWriter, list[Planned]]:
    """A writer with all metadata, and the tensors to come."""
    model_type = model.config["model_type"]
    if why := refusal(model_type, model.quantization, model.hf_config):
        raise UnsupportedError(f"cannot become a GGUF: {why}", where=model.path)
    import gguf

    from mkaq.export.gguf_tensors import Options, planned
    from mkaq.export.gguf_tokenizer import add_tokenizer

    tensors = list(planned(model, options or Options()))
    writer = gguf.GGUFWriter(None, ARCHITECTURES[model_type])
    writer.add_type("model")
    add_config(writer, model.hf_config)
    linear = next(tensor.kind for tensor in tensors if ".attn_output.weight" in tensor.name)
    writer.add_file_type(_file_type(linear.name))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    words = add_tokenizer(writer, model.path, model.sizes.vocabulary)
    writer.add_name(_name(about.name, words.strips))
    if about.license:
        writer.add_license(about.license)
    if about.base_model:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, about.base_model.rpartition("/")[2])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{about.base_model}")
    return writer, tensors


def _file_type(linear: str) -> int:
    """llama.cpp's number for a file whose linear layers are of a type."""
    from gguf import LlamaFileType

    named = {"F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_S"}.get(linear, f"MOSTLY_{linear}")
    return int(LlamaFileType[named])


def _name(name: str, strips: bool) -> str:
    """A name that has "phi-3" in it if added tokens strip, and else does not: llama.cpp goes by that."""
    if strips:
        return name if re.search("phi-?3", name, re.IGNORECASE) else f"{name} (phi-3)"
    return re.sub("(phi)-?(3)", r"\1 \2", name, flags=re.IGNORECASE)


def check(model: Checkpoint, folder: Path, about: About, options: Options | None = None) -> Iterator[str]:
    """Compares a file with the checkpoint that it was made from, bit for bit.

    Args:
        model: The checkpoint.
        folder: Where `FILE` lies.
        about: As in `write`.
        options: As in `write`.

    Yields:
        A sentence for each fault.

    Raises:
        UnsupportedError: As `write`.
        CheckpointError: As `write`.
    """
    from mkaq.export.gguf_check import faults

    writer, tensors = _described(model, about, options)
    yield from faults(folder / FILE, writer.kv_data[0], tensors)
