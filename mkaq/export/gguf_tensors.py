"""A checkpoint's tensors as those of a GGUF file: names, types and bytes, one tensor at a time."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from mkaq.checkpoint.reader import Checkpoint
from mkaq.dtypes import FLOATS
from mkaq.errors import CheckpointError, UnsupportedError
from mkaq.export.codes import read_codes
from mkaq.export.gguf_blocks import Bytes, Codes, blocks, exact_type
from mkaq.export.gguf_metadata import ARCHITECTURES, rope_factors
from mkaq.export.settings import GgufTypes
from mkaq.formats.gguf_types import Type
from mkaq.formats.packing import unpack

Order = NDArray[np.intp] | None
_ROWS = 1024  # rows that are encoded at once
_FLOATS = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
_OWN = {torch.float64: Type.F32, torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}


class Planned(NamedTuple):
    """A tensor to write.

    Attributes:
        name: Its name in GGUF.
        kind: Its type.
        shape: Its shape, the innermost dimension last.
        make: Computes its bytes: the shape, with the bytes of a row last.
    """

    name: str
    kind: Type
    shape: tuple[int, ...]
    make: Callable[[], Bytes]


def planned(model: Checkpoint, types: GgufTypes) -> Iterator[Planned]:
    """All tensors in the order of the file.

    Raises:
        UnsupportedError: If a linear layer fits no type exactly.
    """
    architecture = ARCHITECTURES[model.config["model_type"]]
    names = gguf.get_tensor_name_map(_architecture(architecture), model.num_layers)
    for name, values in rope_factors(model.hf_config).items():
        yield Planned(name, Type.F32, values.shape, partial(_bytes, values))
    ends = ("qweight", "weight", "bias")
    for name in sorted(n for n in model.tensors if n.endswith(ends)):
        module, _, end = name.rpartition(".")
        target = names.get_name(f"{module}.{'bias' if end == 'bias' else 'weight'}", (".weight", ".bias"))
        if target is None:
            raise UnsupportedError(f"GGUF has no name for the tensor {name}", where=model.path)
        order = _order(model, module) if architecture == "llama" else None
        if end == "qweight":
            yield _quantized(model, module, target, order)
            continue
        shape, kind = model.tensors[name].shape, _kind(model, name, types)
        yield Planned(target, kind, shape, partial(_dense, model, name, kind, order))


def _architecture(name: str) -> gguf.MODEL_ARCH:
    return next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def _order(model: Checkpoint, module: str) -> Order:
    """Where each row comes from: llama.cpp rotates neighbouring rows, transformers the halves of a head."""
    heads = {"q_proj": model.sizes.heads, "k_proj": model.sizes.kv_heads}.get(module.rpartition(".")[2])
    if heads is None:
        return None
    return np.arange(heads * model.sizes.head_dim).reshape(heads, 2, -1).swapaxes(1, 2).ravel()


def _kind(model: Checkpoint, name: str, types: GgufTypes) -> Type:
    if len(model.tensors[name].shape) == 1:
        return Type.F32
    outer = name in (model.arch.embed_weight, model.arch.head_weight)
    wanted = types.embedding if outer else types.dense
    kind = _OWN[FLOATS[model.tensors[name].dtype]] if wanted == "source" else Type[wanted.upper()]
    block, columns = gguf.GGML_QUANT_SIZES[kind][0], model.tensors[name].shape[-1]
    if columns % block:
        what = f"tensor {name} has {columns} columns, {wanted} takes multiples of {block}"
        raise UnsupportedError(what, where=model.path)
    return kind


def _dense(model: Checkpoint, name: str, kind: Type, order: Order) -> Bytes:
    """A tensor in another type, rounded only by the types that have blocks."""
    tensor = model.read([name])[name]
    tensor = tensor if order is None else tensor[torch.from_numpy(order)]
    pieces = [_encode(tensor[start : start + _ROWS], kind) for start in range(0, len(tensor), _ROWS)]
    if lost := sum(count for _, count in pieces):
        fix = "choose the type of the source (`source`), or one that rounds on purpose (q8_0)"
        what = f"{lost} of the {tensor.numel()} values of {name} do not fit {kind.name.lower()} exactly"
        raise UnsupportedError(what, where=model.path, fix=fix)
    return np.concatenate([data for data, _ in pieces])


def _encode(values: torch.Tensor, kind: Type) -> tuple[Bytes, int]:
    """The bytes, and the number of values that a floating-point type cannot hold."""
    if kind not in _FLOATS:
        return gguf.quants.quantize(values.float().numpy(), kind), 0
    exact = values.to(_FLOATS[kind])
    lost = int((exact.double() != values.double()).sum()) if exact.dtype != values.dtype else 0
    whole = exact.contiguous().view(torch.uint8) if exact.dim() else exact
    return np.asarray(whole.numpy(), np.uint8), lost


def _bytes(values: NDArray[Any]) -> Bytes:
    return np.ascontiguousarray(values).view(np.uint8)


def _quantized(model: Checkpoint, module: str, target: str, order: Order) -> Planned:
    config = model.quantization or {}
    rows, columns = model.tensors[f"{module}.qweight"].shape[1], model.tensors[f"{module}.g_idx"].shape[0]
    kind = exact_type(config["bits"], config.get("sym", True), config["group_size"], columns)
    if kind is None:
        what = f"no GGUF type holds {module}: {columns} columns, group_size {config['group_size']}"
        raise UnsupportedError(what, where=model.path)
    return Planned(target, Type[kind], (rows, columns), partial(_blocks, model, module, kind, order))


def _blocks(model: Checkpoint, module: str, kind: str, order: Order) -> Bytes:
    """The codes of a GPTQ layer as blocks."""
    config = model.quantization or {}
    words, scales, zeros = read_codes(model, module)
    bits = int(config["bits"])
    size = words.shape[1] * 32 // bits // scales.shape[1]
    halves = scales.to(torch.float16)
    if not torch.equal(halves.double(), scales.double()):
        raise UnsupportedError(f"the scales of {module} do not fit float16", where=model.path)
    done = []
    for start in range(0, len(words), _ROWS):
        part = slice(start, start + _ROWS)
        steps = unpack(words[part].T, bits).T - zeros[part].repeat_interleave(size, dim=1)
        steps, offsets = steps.to(torch.int16), zeros[part].to(torch.int16)
        codes = Codes(steps.numpy(), halves[part].numpy(), offsets.numpy())
        try:
            done.append(blocks(codes, kind))
        except ValueError as error:
            what = f"{module} does not hold what quantization_config says: {error}"
            raise CheckpointError(what, where=model.path) from None
    result = np.concatenate(done)
    return result if order is None else result[order]
