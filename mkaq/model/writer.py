"""Writing a checkpoint: a streaming safetensors writer, deterministic to the byte."""

import json
import os
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open

from mkaq.errors import VerificationError
from mkaq.model.checkpoint import INDEX, SINGLE, Checkpoint

_NAMES = {  # in the order in which the safetensors library lays types: aligned, the largest first
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_RANK = {dtype: rank for rank, dtype in enumerate(_NAMES)}


class ShardWriter:
    """Writes tensors to safetensors files as they come, with one tensor in memory at a time.

    Data is spooled to a scratch file beside the shard and given its header when the shard is
    full. Within a shard tensors lie as the safetensors library lays them (by type, the
    largest first, then by name), so that each is aligned. On leaving the `with` block every tensor is read
    back and compared.

    Args:
        folder: Where the files go.
        shard_size: Largest number of data bytes of one file; a larger tensor gets its own.
    """

    def __init__(self, folder: Path, shard_size: int) -> None:
        self.folder, self.shard_size = folder, shard_size
        self.total_size = 0
        self._shards: list[list[str]] = []
        self._checksums: dict[str, int] = {}
        self._pending: dict[str, tuple[torch.dtype, list[int], int, int]] = {}
        self._spool_path = folder / ".spool"
        self._spool = self._spool_path.open("w+b")

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Adds one tensor (any device; its own type).

        Raises:
            ValueError: If there is one of that name already.
        """
        if name in self._checksums:
            raise ValueError(f"tensor {name} is written twice")
        data = tensor_bytes(tensor)
        start = self._spool.tell()
        if self._pending and start + data.nbytes > self.shard_size:
            self._close_shard()
            start = 0
        self._spool.write(data)
        self._pending[name] = (tensor.dtype, list(tensor.shape), start, data.nbytes)
        self._checksums[name] = zlib.crc32(data)
        self.total_size += data.nbytes

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._pending:
                self._close_shard()
        finally:
            self._spool.close()
            self._spool_path.unlink(missing_ok=True)
        if kind is None:
            self._name_shards()
            self._compare()

    def _close_shard(self) -> None:
        order = sorted(self._pending, key=lambda name: (_RANK[self._pending[name][0]], name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in order:
            dtype, shape, _, size = self._pending[name]
            header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
        encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        encoded += b" " * (-len(encoded) % 8)
        with self._part(len(self._shards)).open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for name in order:
                _, _, start, size = self._pending[name]
                self._spool.seek(start)
                while size:
                    block = self._spool.read(min(size, 16 << 20))
                    file.write(block)
                    size -= len(block)
            file.flush()
            os.fsync(file.fileno())
        self._shards.append(order)
        self._pending.clear()
        self._spool.seek(0)
        self._spool.truncate()

    def _part(self, number: int) -> Path:
        return self.folder / f".part-{number}"

    def _name_shards(self) -> None:
        count = len(self._shards)
        names = (
            [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        )
        for number, name in enumerate(names):
            self._part(number).rename(self.folder / name)
        if count > 1:
            weight_map = {t: names[i] for i, shard in enumerate(self._shards) for t in shard}
            index = {
                "metadata": {"total_size": self.total_size},
                "weight_map": dict(sorted(weight_map.items())),
            }
            write_json(self.folder / INDEX, index)
        self._files = dict(zip(names, self._shards, strict=True))

    def _compare(self) -> None:
        for file, shard in self._files.items():
            with safe_open(self.folder / file, framework="pt") as handle:
                for name in shard:
                    if zlib.crc32(tensor_bytes(handle.get_tensor(name))) != self._checksums[name]:
                        raise VerificationError(
                            f"tensor {name} reads back changed: the disk is failing", where=file
                        )


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, as a safetensors file holds them."""
    flat: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def write_json(path: Path, data: Any) -> None:
    """Writes JSON in the one form that mkaq writes: two spaces, UTF-8, a final newline."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_side_files(source: Checkpoint, folder: Path) -> None:
    """Copies the tokenizer, the generation settings and the chat template of a checkpoint."""
    from mkaq.model.checkpoint import SIDE_FILES

    for name in SIDE_FILES:
        if (source.path / name).is_file():
            (folder / name).write_bytes((source.path / name).read_bytes())
