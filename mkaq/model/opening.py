"""Opening a checkpoint: safetensors only, complete, and checked before anything is built from it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mkaq.errors import CheckpointError, UnsupportedError
from mkaq.model.architecture import family_of, layer_count
from mkaq.model.checkpoint import DTYPES, INDEX, SIDE_FILES, SINGLE, Checkpoint, TensorInfo
from mkaq.model.expected import expected_tensors

_CHOOSES_CODE = (
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
)
_SIZES = {
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "vocab_size": 2**24,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**13,
}


def open_checkpoint(path: Path, *, quantized: bool = False) -> Checkpoint:
    """Opens a checkpoint: reads config.json, the index and every header, and checks completeness.

    Args:
        path: Its folder.
        quantized: Whether a checkpoint that is quantized already is welcome.

    Raises:
        CheckpointError: If it is damaged, incomplete or unsafe (pickle, remote code).
        UnsupportedError: If its family or its quantization is not supported.
    """
    config = _read_config(path, quantized)
    files = _weight_files(path)
    _check_links(path, files)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in _read_header(path, file).items():
            if name in tensors:
                raise CheckpointError(f"tensor {name} is also in {tensors[name].file}", where=path / file)
            tensors[name] = info
    _check_index(path, tensors)
    checkpoint = Checkpoint(path, config, tensors)
    _check_layers(checkpoint)
    ignored = {name for name in tensors if name.endswith("rotary_emb.inv_freq")}
    if checkpoint.hf_config.tie_word_embeddings:
        ignored.add("lm_head.weight")
    checkpoint = Checkpoint(path, config, {k: v for k, v in tensors.items() if k not in ignored})
    _check_complete(checkpoint)
    return checkpoint


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint.

    Raises:
        CheckpointError: If there is none.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            "is missing", where=path, fix="a model folder holds config.json and .safetensors"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"is not readable JSON: {error}", where=path) from None
    if not isinstance(data, dict):
        raise CheckpointError("is not a JSON object", where=path)
    return data


def _read_config(path: Path, quantized: bool) -> dict[str, Any]:
    where = path / "config.json"
    config = read_json(where)
    if config.get("auto_map"):
        raise CheckpointError("auto_map asks for remote code, which mkaq never runs", where=where)
    family_of(config, where)
    layer_count(config, where)
    for key, most in _SIZES.items():
        value = config.get(key)
        if value is not None and (not isinstance(value, int) or not 1 <= value <= most):
            raise CheckpointError(f"{key} is {str(value)[:40]}, not a number from 1 to {most}", where=where)
    config = {key: value for key, value in config.items() if key not in _CHOOSES_CODE}
    method = config.get("quantization_config")
    if method is not None and not isinstance(method, dict):
        raise CheckpointError("quantization_config is not an object", where=where)
    if method is not None and not quantized:
        raise UnsupportedError(
            f"is quantized already ({method.get('quant_method')})",
            where=path,
            fix="start from the original weights",
        )
    if method is not None and method.get("quant_method") not in ("gptq", "bitsandbytes"):
        raise UnsupportedError(f"quantization {method.get('quant_method')!r} is not supported", where=where)
    return config


def _weight_files(path: Path) -> list[str]:
    if (path / INDEX).is_file():
        weight_map = read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError("has no weight_map", where=path / INDEX)
        for name, file in weight_map.items():
            if not isinstance(file, str) or not re.fullmatch(r"\w[\w.-]{0,200}\.safetensors", file):
                raise CheckpointError(
                    f"{name} points to {file!r}, which is no file of this folder", where=path / INDEX
                )
        files = sorted(set(weight_map.values()))
        if missing := [file for file in files if not (path / file).is_file()]:
            raise CheckpointError(
                f"{len(missing)} of {len(files)} weight files missing: {', '.join(missing[:5])}",
                where=path,
                fix="download the checkpoint again",
            )
        return files
    if (path / SINGLE).is_file():
        return [SINGLE]
    if pickles := sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern)):
        raise CheckpointError(
            f"only pickle weights ({', '.join(pickles[:3])}); a pickle can run code, so mkaq never opens one",
            where=path,
            fix="get or convert the checkpoint as safetensors",
        )
    raise CheckpointError(f"no weights: neither {SINGLE} nor {INDEX}", where=path)


def _check_links(path: Path, weight_files: list[str]) -> None:
    """A link must not bring in a file from elsewhere; the hub's cache links into its own folder."""
    home = path.resolve()
    home = home.parent.parent if home.parent.name == "snapshots" else home
    for name in ("config.json", INDEX, *SIDE_FILES, *weight_files):
        if (path / name).is_symlink() and not (path / name).resolve().is_relative_to(home):
            fix = "copy the file itself into the folder"
            raise CheckpointError("is a link that leaves the folder", where=path / name, fix=fix)


def _read_header(path: Path, file: str) -> dict[str, TensorInfo]:
    try:
        with safe_open(path / file, framework="pt") as handle:  # checks the header as a whole
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
        with (path / file).open("rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(size))
        return {
            name: TensorInfo(
                file,
                str(part.get_dtype()),
                tuple(part.get_shape()),
                8 + size + header[name]["data_offsets"][0],
            )
            for name, part in slices.items()
        }
    except (OSError, SafetensorError) as error:
        reason = "the file is empty or cut short" if (path / file).stat().st_size < 8 else str(error)
        raise CheckpointError(f"is not a whole safetensors file: {reason}", where=path / file) from None


def _check_index(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    if not (path / INDEX).is_file():
        return
    for name, file in read_json(path / INDEX)["weight_map"].items():
        if name not in tensors:
            raise CheckpointError(
                f"tensor {name} is not in {file}, where the index puts it", where=path / INDEX
            )
        if tensors[name].file != file:
            raise CheckpointError(
                f"tensor {name} is in {tensors[name].file}, not in {file}", where=path / INDEX
            )


def _check_layers(checkpoint: Checkpoint) -> None:
    """Before anything is built from config.json, which may ask for any number of layers."""
    found = max(checkpoint.names_by_layer, default=-1) + 1
    if found != checkpoint.num_layers:
        raise CheckpointError(
            f"config.json says {checkpoint.num_layers} layers, the weights have {found}",
            where=checkpoint.path,
        )


def _check_complete(checkpoint: Checkpoint) -> None:
    family, where = checkpoint.family, checkpoint.path / "config.json"
    expected = expected_tensors(checkpoint.dense_shapes, family.linear_names, checkpoint.quantization, where)
    if missing := [name for name in expected if name not in checkpoint.tensors]:
        raise CheckpointError(
            f"{len(missing)} tensors missing that config.json implies, such as {missing[0]}",
            where=checkpoint.path,
            fix="download or export the checkpoint again",
        )
    for name, shape in expected.items():
        actual = checkpoint.tensors[name].shape
        if shape is not None and actual != shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(actual)}, config.json implies {list(shape)}",
                where=checkpoint.path / checkpoint.tensors[name].file,
            )
    for name, info in checkpoint.tensors.items():
        if name in expected and info.dtype not in _types_of(name, checkpoint):
            where = checkpoint.path / info.file
            raise UnsupportedError(f"tensor {name} is of type {info.dtype}", where=where)
    if extra := [name for name in checkpoint.tensors if name not in expected]:
        raise CheckpointError(
            f"{len(extra)} tensors that config.json does not imply, such as {extra[0]}", where=checkpoint.path
        )


def _types_of(name: str, checkpoint: Checkpoint) -> tuple[str, ...]:
    """The types that a tensor may have: whole numbers are codes of a quantization, and nothing else."""
    below_layer, part = name.split(".", 3)[-1], name.rpartition(".")[2]
    config = checkpoint.quantization
    if config is None or not below_layer.startswith(tuple(f"{n}." for n in checkpoint.family.linear_names)):
        return tuple(DTYPES)
    codes = {"qweight": "I32", "qzeros": "I32", "g_idx": "I32", "weight_format": "U8"}
    codes["weight"] = "I8" if config.get("load_in_8bit") else "U8"
    if part.startswith("bitsandbytes__"):
        return ("U8",)
    if part == "absmax":  # codes themselves where the scales are quantized too
        return (*DTYPES, "U8")
    return (codes[part],) if part in codes else tuple(DTYPES)
