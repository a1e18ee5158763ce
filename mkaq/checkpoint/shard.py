"""Writes one safetensors file: each tensor goes straight to its offset, is hashed and synced."""

import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from xxhash import xxh3_128

from mkaq.checkpoint.layout import Layout
from mkaq.checkpoint.reader import BLOCK
from mkaq.errors import VerificationError

_NAMES = {  # in the order of the safetensors library, which keeps tensors aligned
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_STEP = 256 * 1024 * 1024  # bytes per sync
_WAITING = 64 * 1024 * 1024  # bytes that may wait in memory to be hashed
_RANK = {dtype: rank for rank, dtype in enumerate(_NAMES)}


class Shard:
    """One safetensors file that is being written. The first tensor opens it and writes its header.

    Args:
        path: The file.
        specs: Its tensors.
        hashing: An executor with a single thread, so that bytes are hashed in the order of submission.
        syncing: Another executor with a single thread.
    """

    def __init__(self, path: Path, specs: Layout, hashing: Executor, syncing: Executor) -> None:
        self.path, self.specs = path, specs
        self._order = sorted(specs, key=lambda name: (_RANK[specs[name].dtype], name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offsets, end = {}, 0
        for name in self._order:
            dtype, shape = specs[name]
            offsets[name], end = end, end + specs[name].nbytes
            header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [offsets[name], end]}
        encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._header = len(encoded).to_bytes(8, "little") + encoded
        self._start = {name: len(self._header) + offset for name, offset in offsets.items()}
        self._size = len(self._header) + end
        self._rest: dict[str, tuple[int, str]] = {}  # what to hash from disk: first byte, checksum
        self._digest = sha256(self._header)
        self._queued = 0  # tensors queued for hashing, in file order
        self._waiting = deque[tuple[Future[None], int]]()  # blocks to be hashed from memory, and their bytes
        self._hashing, self._syncing = hashing, syncing
        self._unsynced = 0  # bytes written since the last sync was queued
        self._underway: list[Future[None]] = []
        self._handle: int | None = None

    def write(self, name: str, blocks: Iterable[memoryview]) -> str:
        """Writes a tensor's data at its offset.

        Args:
            name: The tensor.
            blocks: Its bytes, in order. They must not change until `hashed()` returns.

        Returns:
            The xxh3_128 of the bytes.

        Raises:
            ValueError: If their number is not what dtype and shape imply.
        """
        if self._handle is None:
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            os.posix_fallocate(self._handle, 0, self._size)
            write_at(self._handle, 0, memoryview(self._header))
        in_turn = name == self._order[self._queued]
        offset, checksum, rest = self._start[name], xxh3_128(), xxh3_128()
        end = offset + self.specs[name].nbytes
        reread = end if in_turn else offset  # where the part begins that is hashed from disk
        for block in blocks:
            if offset + block.nbytes <= end:
                write_at(self._handle, offset, block)
            checksum.update(block)
            if offset < reread and self._has_room(block.nbytes):
                self._waiting.append((self._hashing.submit(self._digest.update, block), block.nbytes))
            else:
                reread = min(reread, offset)
                rest.update(block)
            offset += block.nbytes
        if offset != end:
            raise ValueError(f"tensor {name} has {offset - end:+} bytes more than the layout says")
        self._rest[name] = reread, rest.hexdigest()
        self._unsynced += self.specs[name].nbytes
        self._queue_work()
        return checksum.hexdigest()

    def _has_room(self, size: int) -> bool:
        """Whether a block of `size` bytes may wait in memory to be hashed."""
        self.hashed(wait=False)
        return not self._waiting or sum(waiting for _, waiting in self._waiting) + size <= _WAITING

    def hashed(self, *, wait: bool = True) -> None:
        """Releases blocks in memory that have been hashed; with `wait`, waits for all of them."""
        while self._waiting and (wait or self._waiting[0][0].done()):
            self._waiting.popleft()[0].result()

    def _queue_work(self) -> None:
        """Queues hashing of the rest of each tensor whose turn it is, and a sync when one is due."""
        while self._queued < len(self._order) and (name := self._order[self._queued]) in self._rest:
            self._underway.append(self._hashing.submit(self._hash_rest, name))
            self._queued += 1
        if len(self._rest) == len(self.specs) or self._unsynced >= _STEP:
            self._unsynced = 0
            self._underway.append(self._syncing.submit(self._sync))

    def _hash_rest(self, name: str) -> None:
        """Hashes from disk the part of a tensor that was not hashed from memory, and verifies it."""
        assert self._handle is not None
        (start, expected), checksum = self._rest[name], xxh3_128()
        end = self._start[name] + self.specs[name].nbytes
        for block in read_at(self._handle, start, end - start):
            self._digest.update(block)
            checksum.update(block)
        if checksum.hexdigest() != expected:
            raise VerificationError(
                f"tensor {name} reads back changed: the disk is failing", where=self.path.parent
            )

    def _sync(self) -> None:
        assert self._handle is not None
        os.fdatasync(self._handle)

    def finish(self) -> str:
        """Waits until the complete file is on disk; returns its sha256.

        Raises:
            VerificationError: If a tensor reads back changed.
            OSError: If a sync failed.
        """
        for work in self._underway:
            work.result()
        return self._digest.hexdigest()

    def close(self) -> None:
        """Closes the file if it is open."""
        if self._handle is not None:
            os.close(self._handle)
        self._handle = None


def checksum_of(tensor: torch.Tensor) -> str:
    """xxh3_128 of a tensor's bytes: it detects accidents, not tampering."""
    return xxh3_128(tensor_bytes(tensor)).hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, as a safetensors file stores them."""
    flat: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def write_at(handle: int, offset: int, data: memoryview) -> None:
    """Writes all of `data` to a file, from byte `offset` on."""
    while data:
        count = os.pwrite(handle, data, offset)
        data, offset = data[count:], offset + count


def read_at(handle: int, offset: int, size: int) -> Iterator[memoryview]:
    """Reads `size` bytes of a file in blocks, from byte `offset` on; fewer if the file ends before."""
    while size and (block := os.pread(handle, min(size, BLOCK), offset)):
        yield memoryview(block)
        offset, size = offset + len(block), size - len(block)
