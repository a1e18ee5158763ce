"""A checkpoint in Hugging Face format: its headers, and its tensors, read on demand."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mkaq.arch.arch import Arch
from mkaq.arch.config import Sizes, layer_count
from mkaq.arch.families import arch_of
from mkaq.arch.skeleton import dense_tensors
from mkaq.checkpoint.finite import all_finite
from mkaq.checkpoint.side_files import side_files
from mkaq.dtypes import DTYPES, FLOATS
from mkaq.errors import CheckpointError
from mkaq.formats.formats import format_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_NOT_ARCHITECTURE = ("quantization_config", "num_labels", "id2label", "label2id")
_ITEM_SIZE = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2}
BLOCK = 1 << 20  # bytes of a block of a tensor; it fits into a processor's cache


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as a file's header describes it; its data begin at byte `start` of the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """The size of its data in bytes."""
        size = _ITEM_SIZE.get(self.dtype, 1)
        for dimension in self.shape:
            size *= dimension
        return size


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers have been read and whose paths stay inside its folder.

    Attributes:
        path: Its folder.
        config: config.json, corrected where the tensors contradict it or it asks for remote code.
        tensors: Every tensor by name.
        remarks: A sentence for each correction.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    remarks: tuple[str, ...] = ()

    @property
    def arch(self) -> Arch:
        """The names and roles of the model's modules."""
        return arch_of(self.config, self.path / "config.json")

    @property
    def num_layers(self) -> int:
        """The number of decoder layers."""
        return layer_count(self.config, self.path / "config.json")

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """`quantization_config` of a quantized checkpoint."""
        return self.config.get("quantization_config")

    @property
    def quantizes_head(self) -> bool:
        """Whether its quantization includes the output layer."""
        return format_of(self.quantization).quantizes_head(self.quantization or {}, self.arch.head)

    @property
    def quantized_linears(self) -> dict[str, tuple[int, int]]:
        """The full name and (out_features, in_features) of every linear layer that its format packs."""
        result = {
            self.arch.in_layer(index, name): self.linear_shape(name)
            for index in range(self.num_layers)
            for name in self.arch.linear_names
        }
        return result | ({self.arch.head: self.head_shape} if self.quantizes_head else {})

    def quantized_head(self) -> torch.Tensor:
        """What a quantized output layer's codes stand for: float32, shape (vocabulary, hidden_size).

        Raises:
            CheckpointError: If they cannot be read, or contradict one another.
        """
        prefix, config = f"{self.arch.head}.", self.quantization or {}
        names = [name for name in self.outer_tensor_names if name.startswith(prefix)]
        stored = {name.removeprefix(prefix): tensor for name, tensor in self.each(names)}
        try:
            return format_of(config).dequantize(stored, config)
        except ValueError as error:
            raise CheckpointError(f"{self.arch.head} cannot be decoded: {error}", where=self.path) from None

    @property
    def head_shape(self) -> tuple[int, int]:
        """(out_features, in_features) of an output layer of its own.

        Raises:
            KeyError: If it is the embedding.
        """
        rows, columns = self.dense_shapes[self.arch.head_weight]
        return rows, columns

    @property
    def nbytes(self) -> int:
        """The size of all tensors in bytes."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def weight_files(self) -> list[str]:
        """The names of its safetensors files."""
        return sorted({info.file for info in self.tensors.values()})

    @property
    def files(self) -> list[str]:
        """The names of all files of the model, weights last."""
        index = [INDEX] if (self.path / INDEX).is_file() else []
        return ["config.json", *side_files(self.path), *index, *self.weight_files]

    @cached_property
    def hf_config(self) -> Any:
        """The configuration object of transformers, with defaults filled in and without quantization."""
        from transformers import AutoConfig

        plain = {k: v for k, v in self.config.items() if k not in _NOT_ARCHITECTURE}
        try:
            return AutoConfig.for_model(**plain)
        except Exception as error:  # its validation raises many kinds
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"transformers refuses it: {reason}", where=self.path / "config.json"
            ) from None

    @cached_property
    def sizes(self) -> Sizes:
        """The sizes in the configuration."""
        return Sizes.of(self.hf_config)

    @cached_property
    def weights_by_dtype(self) -> Mapping[torch.dtype, int]:
        """How many weights that are not quantized have each dtype; the embedding's comes first."""
        counts = {FLOATS[self.tensors[self.arch.embed_weight].dtype]: 0}
        for name in self.dense_shapes:
            if name in self.tensors and self.tensors[name].dtype in FLOATS:
                dtype = FLOATS[self.tensors[name].dtype]
                counts[dtype] = counts.get(dtype, 0) + self.count_weights([name])
        return counts

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most weights that are not quantized, in which they are all written."""
        return max(self.weights_by_dtype, key=lambda dtype: self.weights_by_dtype[dtype])

    @cached_property
    def dense_shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of every tensor of this model without quantization."""
        try:
            return dense_tensors(self.hf_config, self.arch)
        except Exception as error:  # a wrong configuration can fail anywhere in the model's code
            raise CheckpointError(
                f"transformers cannot build the model that it describes: {type(error).__name__}: "
                f"{str(error).partition(chr(10))[0][:200]}",
                where=self.path / "config.json",
            ) from None

    @property
    def parameters(self) -> int:
        """The number of weights of this model without quantization."""
        return sum(torch.Size(shape).numel() for shape in self.dense_shapes.values())

    def count_weights(self, names: Iterable[str]) -> int:
        """The number of values that tensors hold as stored."""
        return sum(torch.Size(self.tensors[name].shape).numel() for name in names)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Reads tensors to the CPU and checks that each is finite.

        Raises:
            CheckpointError: If one cannot be read or holds NaN or infinity.
        """
        return {name: self._read(name) for name in names}

    def _read(self, name: str) -> torch.Tensor:
        info = self._info(name)
        tensor = torch.empty(info.shape, dtype=DTYPES[info.dtype])
        with self._opened(info) as handle:  # not mapped: a file that fails or shrinks is an error, no signal
            _read_at(handle, info.start, tensor, self.path / info.file)
        self._check_finite(name, tensor)
        return tensor

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Reads a floating-point tensor in flat blocks, in order, each checked to be finite.

        All blocks but the last hold `BLOCK` bytes; an empty tensor gives one empty block.

        Raises:
            CheckpointError: If it cannot be read or holds NaN or infinity.
        """
        info = self._info(name)
        item = FLOATS[info.dtype].itemsize
        with self._opened(info) as handle:
            for offset in range(0, max(info.nbytes, 1), BLOCK):
                block = torch.empty(min(BLOCK, info.nbytes - offset) // item, dtype=FLOATS[info.dtype])
                _read_at(handle, info.start + offset, block, self.path / info.file)
                self._check_finite(name, block)
                yield block

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Reads only the given rows of a floating-point matrix, checked to be finite.

        Args:
            name: A tensor of shape (rows, columns).
            rows: Row numbers, shape (n,).

        Returns:
            Shape (n, columns), in the tensor's own dtype.

        Raises:
            CheckpointError: If it cannot be read or holds NaN or infinity.
            IndexError: If there is no such row.
        """
        info = self._info(name)
        count, columns = info.shape
        result = torch.empty(len(rows), columns, dtype=FLOATS[info.dtype])
        with self._opened(info) as handle:
            for values, row in zip(result, rows.tolist(), strict=True):
                if not 0 <= row < count:
                    raise IndexError(f"{name} has {count} rows, and no row {row}")
                start = info.start + row * columns * result.itemsize
                _read_at(handle, start, values, self.path / info.file)
        self._check_finite(name, result)
        return result

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"tensor {name} is missing", where=self.path)
        return self.tensors[name]

    @contextmanager
    def _opened(self, info: TensorInfo) -> Iterator[int]:
        try:
            handle = os.open(self.path / info.file, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error}", where=self.path / info.file) from None
        try:
            yield handle
        finally:
            os.close(handle)

    def _check_finite(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.is_floating_point() and not all_finite(tensor):
            raise CheckpointError(f"tensor {name} holds NaN or infinity", where=self.path)

    def each(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields names and tensors, with one tensor in memory at a time."""
        for name in names:
            yield name, self.read([name])[name]

    def linear_shape(self, name: str) -> tuple[int, int]:
        """(out_features, in_features) of a linear layer, taken from layer 0 of the dense model."""
        rows, columns = self.dense_shapes[self.arch.in_layer(0, f"{name}.weight")]
        return rows, columns

    def linear_shapes(self) -> list[tuple[int, int]]:
        """The shapes of all linear layers of a decoder layer."""
        return [self.linear_shape(name) for name in self.arch.linear_names]

    def read_layer(self, index: int) -> dict[str, torch.Tensor]:
        """The stored tensors of a decoder layer, by their names in the layer."""
        prefix = f"{self.arch.layer_name(index)}."
        stored = self.read(self.layer_tensor_names(index))
        return {name.removeprefix(prefix): tensor for name, tensor in stored.items()}

    def layer_tensor_names(self, layer: int) -> list[str]:
        """The names of all tensors of a decoder layer."""
        return self.names_by_layer.get(layer, [])

    @cached_property
    def names_by_layer(self) -> Mapping[int, list[str]]:
        """The tensor names of every decoder layer that has tensors."""
        result: dict[int, list[str]] = {}
        for name in sorted(self.tensors):
            if split := self.arch.split(name):
                result.setdefault(split[0], []).append(name)
        return result

    @property
    def outer_tensor_names(self) -> list[str]:
        """The names of all tensors outside the decoder layers."""
        return sorted(name for name in self.tensors if self.arch.split(name) is None)


def _read_at(handle: int, start: int, tensor: torch.Tensor, where: Path) -> None:
    """Fills a contiguous tensor with a file's bytes from byte `start` on."""
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    unread = memoryview(flat)
    try:
        while unread:
            count = os.preadv(handle, [unread], start)
            if count == 0:
                raise CheckpointError("is cut short", where=where)
            unread, start = unread[count:], start + count
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error}", where=where) from None
