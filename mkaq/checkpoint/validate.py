"""Opens a checkpoint: safetensors only, complete, and validated before anything is built from it."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mkaq.arch.config import layer_count
from mkaq.arch.families import FAMILIES, arch_of
from mkaq.checkpoint.agreement import check_agreement, settle_head
from mkaq.checkpoint.names import wrong_names
from mkaq.checkpoint.reader import INDEX, SINGLE, Checkpoint, TensorInfo
from mkaq.checkpoint.remote_code import remote_code_keys, without_remote_code
from mkaq.checkpoint.side_files import side_files, stays_inside
from mkaq.errors import CheckpointError, UnsupportedError
from mkaq.files import is_file
from mkaq.formats.format import TensorSchema
from mkaq.formats.formats import format_of
from mkaq.units import human

_CHOOSES_CODE = (
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
)
_TOKENIZER = "tokenizer_config.json"
_AGAIN = "download the checkpoint again"
_LARGEST_JSON = 100_000_000  # bytes; the safetensors library reads headers of no more
_SIZES = {
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "vocab_size": 2**24,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**13,
}


def open_checkpoint(path: Path, *, quantized: bool = False) -> Checkpoint:
    """Opens a checkpoint: reads config.json, the index and every header, and checks that it is complete.

    Args:
        path: Its folder.
        quantized: Whether a quantized checkpoint is accepted.

    Raises:
        CheckpointError: If it is damaged, incomplete or unsafe (pickle, remote code).
        UnsupportedError: If its family or its quantization is not supported.
    """
    config, remarks = _read_config(path, quantized)
    tensors = read_headers(path)
    kept = {name: info for name, info in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    checkpoint = Checkpoint(path, config, kept, remarks)
    _check_layers(checkpoint)
    checkpoint = settle_head(checkpoint)
    _check_complete(checkpoint)
    added = tuple(_types(checkpoint))
    return replace(checkpoint, remarks=checkpoint.remarks + added) if added else checkpoint


def _types(checkpoint: Checkpoint) -> Iterator[str]:
    """A remark if weights are of several types, of which one is written."""
    if len(checkpoint.weights_by_dtype) > 1:
        named = {str(dtype).removeprefix("torch."): n for dtype, n in checkpoint.weights_by_dtype.items()}
        listed = ", ".join(f"{count:,} in {name}" for name, count in sorted(named.items()))
        chosen = str(checkpoint.dtype).removeprefix("torch.")
        yield f"its weights are of several types ({listed}): model.dtype: auto is {chosen} for all of them"


def read_headers(path: Path) -> dict[str, TensorInfo]:
    """Reads the index and every header of a folder; all links stay inside it.

    Raises:
        CheckpointError: If one is damaged, or they contradict one another.
    """
    files = _weight_files(path)
    _check_links(path, files)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in _read_header(path, file).items():
            if not name.isprintable():
                raise CheckpointError(f"the name {name!r} has control characters", where=path / file)
            if name in tensors:
                raise CheckpointError(f"tensor {name} is also in {tensors[name].file}", where=path / file)
            tensors[name] = info
    _check_index(path, tensors)
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file of a checkpoint.

    Raises:
        CheckpointError: If the file is missing, or no file, or too large, or holds no JSON object.
    """
    if not path.is_file():  # a pipe or a device would never end
        raise CheckpointError(
            "is missing", where=path, fix="a model folder holds config.json and .safetensors"
        )
    if path.stat().st_size > _LARGEST_JSON:
        raise CheckpointError(f"is larger than {human(_LARGEST_JSON)}", where=path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"is not readable JSON: {error}", where=path) from None
    if not isinstance(data, dict):
        raise CheckpointError("is not a JSON object", where=path)
    return data


def _read_config(path: Path, quantized: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """config.json without the keys that choose code, and a remark if it asks for remote code."""
    where = path / "config.json"
    _check_links(path, [])
    config = read_json(where)
    code = remote_code_keys(config)
    if code and config.get("model_type") not in tuple(FAMILIES):
        raise CheckpointError(f"{code[0]} asks for remote code, which mkaq never runs", where=where)
    arch = arch_of(config, where)
    layer_count(config, where)
    for key, most in _SIZES.items():
        value = config.get(key)
        if value is not None and (not isinstance(value, int) or not 1 <= value <= most):
            raise CheckpointError(f"{key} is {str(value)[:40]}, not a number from 1 to {most}", where=where)
    if isinstance(config.get("quantization"), dict):
        fix = "name the artifact's own folder, or start from the original weights"
        raise UnsupportedError("is quantized in the form of MLX", where=path, fix=fix)
    method = config.get("quantization_config")
    if method is not None and not isinstance(method, dict):
        raise CheckpointError("quantization_config is not an object", where=where)
    if method is not None and not quantized:
        raise UnsupportedError(
            f"is quantized already ({method.get('quant_method')})",
            where=path,
            fix="start from the original weights",
        )
    other = path / "quantize_config.json"
    check_agreement(config, read_json(other) if method is not None and other.is_file() else None, where)
    if method is not None:
        format_of(method, where).check_config(method, arch, where)
    config = {key: value for key, value in config.items() if key not in _CHOOSES_CODE}
    keys_of = {"config.json": code, _TOKENIZER: _tokenizer_code(path)}
    removed = [f"{', '.join(keys)} of {name}" for name, keys in keys_of.items() if keys]
    why = f"transformers has {config['model_type']} itself, and remote code is never run"
    remark = f"{' and '.join(removed)} left out: {why}"
    return without_remote_code(config), (remark,) if removed else ()


def _tokenizer_code(path: Path) -> list[str]:
    return remote_code_keys(read_json(path / _TOKENIZER)) if (path / _TOKENIZER).is_file() else []


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
        if missing := [file for file in files if not is_file(path / file)]:
            raise CheckpointError(
                f"{len(missing)} of {len(files)} weight files missing: {', '.join(missing[:5])}",
                where=path,
                fix=_AGAIN,
            )
        if SINGLE not in files and (path / SINGLE).is_file():
            what = f"leaves out {SINGLE}, which is there too and which transformers would read instead"
            raise CheckpointError(what, where=path / INDEX, fix="delete the one that is not the model")
        return files
    if (path / SINGLE).is_file():
        return [SINGLE]
    if pickles := sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern)):
        raise CheckpointError(
            f"only pickle weights ({', '.join(pickles[:3])}); a pickle can run code, so mkaq never opens one",
            where=path,
            fix="get or convert the checkpoint as safetensors",
        )
    if (path / "adapter_config.json").is_file():
        raise CheckpointError(
            "is an adapter (adapter_config.json), not a whole model",
            where=path,
            fix="merge it into its base model (merge_and_unload of peft) and save that",
        )
    raise CheckpointError(f"no weights: neither {SINGLE} nor {INDEX}", where=path)


def _check_links(path: Path, weight_files: list[str]) -> None:
    """Refuses links to files outside the folder."""
    configs = ["config.json", "quantize_config.json", INDEX]
    for name in (*configs, *side_files(path), *weight_files):
        if not stays_inside(path, name):
            fix = "copy the file itself into the folder"
            raise CheckpointError("is a link that leaves the folder", where=path / name, fix=fix)


def _read_header(path: Path, file: str) -> dict[str, TensorInfo]:
    try:
        with safe_open(
            path / file, framework="np"
        ) as handle:  # validates the whole header; torch maps the file
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
        with (path / file).open("rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(size))
        for name, part in slices.items():  # what safetensors lets through
            if not isinstance(header[name], dict):
                raise SafetensorError(f"{name} is described by a list, not by an object")
            if math.prod(size for size in part.get_shape() if size) >= 2**63:
                raise SafetensorError(f"{name} is empty, and has a shape that no tensor has")
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
        raise CheckpointError(
            f"is not a whole safetensors file: {reason}", where=path / file, fix=_AGAIN
        ) from None


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
    """Compares numbers of layers, before a model is built with as many layers as config.json asks for."""
    stored = max(checkpoint.names_by_layer, default=-1) + 1
    if stored != checkpoint.num_layers:
        what = f"config.json says {checkpoint.num_layers} layers, the weights have {stored}"
        raise _misfit(checkpoint, what, fix=_AGAIN)


def _check_complete(checkpoint: Checkpoint) -> None:
    schema = tensor_schema(checkpoint)
    if missing := [name for name in schema if name not in checkpoint.tensors]:
        what = f"{len(missing)} tensors missing that config.json implies, such as {missing[0]}"
        raise _misfit(checkpoint, what, fix="download or export the checkpoint again")
    for name, (shape, _) in schema.items():
        actual = checkpoint.tensors[name].shape
        if shape is not None and actual != shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(actual)}, config.json implies {list(shape)}",
                where=checkpoint.path / checkpoint.tensors[name].file,
            )
    for name, info in checkpoint.tensors.items():
        if name in schema and info.dtype not in schema[name].dtypes:
            where = checkpoint.path / info.file
            raise UnsupportedError(f"tensor {name} is of type {info.dtype}", where=where)
    if extra := [name for name in checkpoint.tensors if name not in schema]:
        what = f"{len(extra)} tensors that config.json does not imply, such as {extra[0]}"
        raise _misfit(checkpoint, what)


def tensor_schema(checkpoint: Checkpoint) -> dict[str, TensorSchema]:
    """The schema of every tensor that config.json implies."""
    config, result = checkpoint.quantization, dict[str, TensorSchema]()
    if checkpoint.quantizes_head and checkpoint.arch.head_weight not in checkpoint.dense_shapes:
        what = "quantization_config says that the output layer is quantized, tie_word_embeddings that it is "
        raise CheckpointError(f"{what}the embedding", where=checkpoint.path / "config.json")
    linears = checkpoint.quantized_linears
    for name, shape in checkpoint.dense_shapes.items():
        module, _, part = name.rpartition(".")
        if part != "weight" or module not in linears:
            result[name] = TensorSchema(shape)
            continue
        stored = format_of(config).schema((shape[0], shape[1]), config or {})
        result |= {f"{module}.{key}": expected for key, expected in stored.items()}
    return result


def _misfit(checkpoint: Checkpoint, what: str, fix: str | None = None) -> CheckpointError:
    error = CheckpointError(what, where=checkpoint.path, fix=fix)
    return wrong_names(checkpoint.tensors, checkpoint.config, error)
