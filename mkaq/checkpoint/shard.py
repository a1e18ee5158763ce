"""One safetensors file while it is written: each tensor straight to its place, hashed and synced."""

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

_NAMES = {  # in the order in which the safetensors library lays types, so that tensors are aligned
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_STEP = 256 * 1024 * 1024  # bytes that are synced at once
_WAITING = 64 * 1024 * 1024  # bytes in memory that may wait to be hashed
_RANK = {dtype: rank for rank, dtype in enumerate(_NAMES)}


class Shard:
    """One safetensors file while it is written. It is opened, and its header written, with the first tensor.

    Args:
        path: Of the file.
        specs: Its tensors.
        hashing: A single thread, so that bytes are hashed in the order in which they are handed over.
        syncing: Another single thread.
    """

    def __init__(self, path: Path, specs: Layout, hashing: Executor, syncing: Executor) -> None:
        self.path, self.specs = path, specs
        self._order = sorted(specs, key=lambda name: (_RANK[specs[name].dtype], name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        places, end = {}, 0
        for name in self._order:
            dtype, shape = specs[name]
            places[name], end = end, end + specs[name].nbytes
            header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [places[name], end]}
        encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._header = len(encoded).to_bytes(8, "little") + encoded
        self._start = {name: len(self._header) + place for name, place in places.items()}
        self._size = len(self._header) + end
        self._again: dict[str, tuple[int, str]] = {}  # from which byte on to read again; its checksum
        self._digest = sha256(self._header)
        self._handed = 0  # tensors that are handed over to be hashed, in their order
        self._waiting = deque[tuple[Future[None], int]]()  # what is to be hashed from memory, and its bytes
        self._hashing, self._syncing = hashing, syncing
        self._unsynced = 0  # bytes that were written since the last sync was asked for
        self._underway: list[Future[None]] = []
        self._handle: int | None = None

    def write(self, name: str, blocks: Iterable[memoryview]) -> str:
        """Writes the data of a tensor to its place.

        Args:
            name: Of the tensor.
            blocks: Its bytes, in order. They must not change until `hashed()` returns.

        Returns:
            The xxh3_128 of the bytes.

        Raises:
            ValueError: If there are more or fewer bytes than its type and shape say.
        """
        if self._handle is None:
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            os.posix_fallocate(self._handle, 0, self._size)
            write_at(self._handle, 0, memoryview(self._header))
        in_turn = name == self._order[self._handed]
        place, checksum, left = self._start[name], xxh3_128(), xxh3_128()
        end = place + self.specs[name].nbytes
        again = end if in_turn else place  # from there on it is to be read again
        for block in blocks:
            if place + block.nbytes <= end:
                write_at(self._handle, place, block)
            checksum.update(block)
            if place < again and self._has_room(block.nbytes):
                self._waiting.append((self._hashing.submit(self._digest.update, block), block.nbytes))
            else:
                again = min(again, place)
                left.update(block)
            place += block.nbytes
        if place != end:
            raise ValueError(f"tensor {name} has {place - end:+} bytes more than the layout says")
        self._again[name] = again, left.hexdigest()
        self._unsynced += self.specs[name].nbytes
        self._go_on()
        return checksum.hexdigest()

    def _has_room(self, size: int) -> bool:
        """Whether a block of so many bytes may wait in memory to be hashed."""
        self.hashed(wait=False)
        return not self._waiting or sum(waiting for _, waiting in self._waiting) + size <= _WAITING

    def hashed(self, *, wait: bool = True) -> None:
        """Lets go of blocks in memory that are hashed; with `wait`, waits until all of them are."""
        while self._waiting and (wait or self._waiting[0][0].done()):
            self._waiting.popleft()[0].result()

    def _go_on(self) -> None:
        """Has the rest of each tensor hashed whose turn it is; has the file synced, if that is due."""
        while self._handed < len(self._order) and (name := self._order[self._handed]) in self._again:
            self._underway.append(self._hashing.submit(self._hash_again, name))
            self._handed += 1
        if len(self._again) == len(self.specs) or self._unsynced >= _STEP:
            self._unsynced = 0
            self._underway.append(self._syncing.submit(self._sync))

    def _hash_again(self, name: str) -> None:
        """Hashes what of a tensor was not hashed from memory; compares it with what was written."""
        assert self._handle is not None
        (start, expected), checksum = self._again[name], xxh3_128()
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
        """Waits until the file, which has all its tensors, is on the disk; returns its sha256.

        Raises:
            VerificationError: If a tensor reads back changed.
            OSError: If a sync failed.
        """
        for work in self._underway:
            work.result()
        return self._digest.hexdigest()

    def close(self) -> None:
        """Closes the file, if it is open."""
        if self._handle is not None:
            os.close(self._handle)
        self._handle = None


def checksum_of(tensor: torch.Tensor) -> str:
    """xxh3_128 of a tensor's bytes: finds accidents, not malice."""
    return xxh3_128(tensor_bytes(tensor)).hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, as a safetensors file holds them."""
    flat: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def write_at(handle: int, place: int, data: memoryview) -> None:
    """Writes all of `data` to a file, from its byte `place` on."""
    while data:
        count = os.pwrite(handle, data, place)
        data, place = data[count:], place + count


def read_at(handle: int, place: int, size: int) -> Iterator[memoryview]:
    """Reads `size` bytes of a file in blocks, from its byte `place` on; fewer, if the file ends before."""
    while size and (block := os.pread(handle, min(size, BLOCK), place)):
        yield memoryview(block)
        place, size = place + len(block), size - len(block)
