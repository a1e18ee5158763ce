"""Writing a checkpoint: safetensors files, deterministic to the byte, every tensor straight to its place."""

import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from xxhash import xxh3_128

from mkaq.checkpoint.reader import BLOCK, INDEX, SINGLE, Checkpoint
from mkaq.checkpoint.side_files import copy_side_files
from mkaq.errors import VerificationError
from mkaq.files import write_json
from mkaq.ranks import Ranks

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
_STEP = 256 * 1024 * 1024  # bytes that are synced at once
_WAITING = 64 * 1024 * 1024  # bytes in memory that may wait to be hashed
_RANK = {dtype: rank for rank, dtype in enumerate(_NAMES)}


class TensorSpec(NamedTuple):
    """Type and shape of a tensor that is to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Layout = Mapping[str, TensorSpec]


class ShardWriter:
    """Writes tensors to safetensors files as they come, with no more than one in memory.

    With a layout every file's header is written first and every tensor goes straight to its place, in
    any order and in pieces if need be. Without one, tensors are spooled to a scratch file until a shard
    is full. Within a shard tensors lie as the safetensors library lays them (by type, the largest
    first, then by name), so that each is aligned. A file has its whole size from the beginning, so that a
    disk that is too small says so at once, and so that syncing it need not wait for its size. Files are
    hashed while they are written, by a thread beside and from memory, and synced to disk by another. What
    comes before its turn, or faster than it can be hashed, is read again when its turn comes, and must have
    the checksum that it had in memory, or leaving the `with` block fails.

    Args:
        folder: Where the files go.
        shard_size: Largest number of data bytes of one file; a larger tensor gets its own.
        layout: Every tensor that will come, in the order in which shards are filled.

    Attributes:
        total_size: Data bytes written.
        digests: sha256 of every weight file by name, once the `with` block is left.

    Raises:
        ValueError: If tensors do not come as the layout says.
        VerificationError: If a tensor reads back changed.
    """

    def __init__(self, folder: Path, shard_size: int, layout: Layout | None = None) -> None:
        self.folder, self.shard_size = folder, shard_size
        self.total_size = 0
        self.digests: dict[str, str] = {}
        self._names: set[str] = set()
        self._shards: list[_Shard] = []
        self._hashing, self._syncing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._spool = None if layout is not None else (folder / ".spool").open("w+b")
        self._pending: dict[str, tuple[TensorSpec, int]] = {}
        for specs in fill_shards(layout or {}, shard_size):
            self._new_shard(specs)
        self._shard_of = {name: shard for shard in self._shards for name in shard.specs}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Adds one tensor (any device; its own type).

        Raises:
            ValueError: If there is one of that name already, or the layout has another or none.
        """
        spec = TensorSpec(tensor.dtype, tuple(tensor.shape))
        if self._spool is None:
            if name in self._shard_of and self._shard_of[name].specs[name] != spec:
                raise ValueError(f"tensor {name} is {spec}, unlike in the layout")
            self.put(name, [tensor])
            self._shard_of[name].hashed()  # its memory is the caller's again
            return
        self._note(name, spec)
        if self._pending and self._spool.tell() + spec.nbytes > self.shard_size:
            self._close_spool()
        self._pending[name] = (spec, self._spool.tell())
        self._spool.write(tensor_bytes(tensor))

    def put(self, name: str, pieces: Iterable[torch.Tensor]) -> str:
        """Writes one tensor of the layout, given in pieces: flat, in order, of its own type.

        Pieces must not change later: they may be hashed after this returns.

        Returns:
            Its `checksum_of`.

        Raises:
            ValueError: If it is there already, or the layout has another or none.
        """
        shard = self._shard_of.get(name)
        if shard is None:
            raise ValueError(f"tensor {name} is not in the layout")
        self._note(name, shard.specs[name])
        return shard.write(name, (tensor_bytes(piece) for piece in pieces))

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._pending:
                self._close_spool()
            if kind is None and (missing := sorted(self._shard_of.keys() - self._names)):
                raise ValueError(f"{len(missing)} tensors of the layout never came, such as {missing[0]}")
        finally:
            self._hashing.shutdown(cancel_futures=kind is not None)
            self._syncing.shutdown()
            for shard in self._shards:
                shard.close()
            if self._spool is not None:
                self._spool.close()
                (self.folder / ".spool").unlink()
        if kind is None:
            self._publish()

    def _note(self, name: str, spec: TensorSpec) -> None:
        if name in self._names:
            raise ValueError(f"tensor {name} is written twice")
        self._names.add(name)
        self.total_size += spec.nbytes

    def _new_shard(self, specs: Layout) -> "_Shard":
        path = self.folder / f".part-{len(self._shards)}"
        self._shards.append(_Shard(path, specs, self._hashing, self._syncing))
        return self._shards[-1]

    def _close_spool(self) -> None:
        assert self._spool is not None
        self._spool.flush()
        shard = self._new_shard({name: spec for name, (spec, _) in self._pending.items()})
        for name, (spec, start) in self._pending.items():
            shard.write(name, _read(self._spool.fileno(), start, spec.nbytes))
        self._pending.clear()
        self._spool.seek(0)
        self._spool.truncate()

    def _publish(self) -> None:
        """Waits for every file; then gives all their names."""
        count = len(self._shards)
        names = (
            [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        )
        for file, shard in zip(names, self._shards, strict=True):
            self.digests[file] = shard.finish()
        for file, shard in zip(names, self._shards, strict=True):
            shard.path.rename(self.folder / file)
        if count > 1:
            weight_map = {t: file for file, s in zip(names, self._shards, strict=True) for t in s.specs}
            index = {
                "metadata": {"total_size": self.total_size},
                "weight_map": dict(sorted(weight_map.items())),
            }
            write_json(self.folder / INDEX, index)


class Discard:
    """Takes tensors as `ShardWriter` does and writes nothing, as all processes but the first do."""

    digests: Mapping[str, str] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Lets go of a tensor."""

    def put(self, name: str, pieces: Iterable[torch.Tensor]) -> str:
        """Lets go of a tensor; its pieces are not even made, so there is no checksum either."""
        return ""

    def __enter__(self) -> "Discard":
        return self

    def __exit__(self, *_: object) -> None: ...


Writer = ShardWriter | Discard


def writer_of(ranks: Ranks, folder: Path, shard_size: int, layout: Layout | None = None) -> Writer:
    """What a process of a group writes with."""
    return ShardWriter(folder, shard_size, layout) if ranks.main else Discard()


class _Shard:
    """One safetensors file under way; it is opened, and its header written, with the first tensor.

    Args:
        path: Of the file.
        specs: Its tensors.
        hashing: A single thread, so that bytes are hashed in the order in which they are handed over.
        syncing: Another one.
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
        """Writes the data of a tensor to its place; returns its checksum."""
        if self._handle is None:
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            os.posix_fallocate(self._handle, 0, self._size)
            _write(self._handle, 0, memoryview(self._header))
        in_turn = name == self._order[self._handed]
        place, checksum, left = self._start[name], xxh3_128(), xxh3_128()
        end = place + self.specs[name].nbytes
        again = end if in_turn else place  # from there on it is to be read again
        for block in blocks:
            if place + block.nbytes <= end:
                _write(self._handle, place, block)
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
        """Lets go of what is hashed; waits until that is all that is in memory, if asked to."""
        while self._waiting and (wait or self._waiting[0][0].done()):
            self._waiting.popleft()[0].result()

    def _go_on(self) -> None:
        """Has hashed what is left of those whose turn it is; syncs, if it is time."""
        while self._handed < len(self._order) and (name := self._order[self._handed]) in self._again:
            self._underway.append(self._hashing.submit(self._hash_again, name))
            self._handed += 1
        if len(self._again) == len(self.specs) or self._unsynced >= _STEP:
            self._unsynced = 0
            self._underway.append(self._syncing.submit(self._sync))

    def _hash_again(self, name: str) -> None:
        assert self._handle is not None
        (start, expected), checksum = self._again[name], xxh3_128()
        end = self._start[name] + self.specs[name].nbytes
        for block in _read(self._handle, start, end - start):
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
        """Waits until a file that is complete is on the disk; returns its sha256."""
        for work in self._underway:
            work.result()
        return self._digest.hexdigest()

    def close(self) -> None:
        """Closes the file, if it is open."""
        if self._handle is not None:
            os.close(self._handle)
        self._handle = None


def fill_shards(layout: Layout, shard_size: int) -> list[dict[str, TensorSpec]]:
    """Splits tensors, in their order, into files of at most `shard_size` data bytes (or one tensor)."""
    shards: list[dict[str, TensorSpec]] = []
    room = 0
    for name, spec in layout.items():
        if not shards or spec.nbytes > room:
            shards.append({})
            room = shard_size
        shards[-1][name] = spec
        room -= spec.nbytes
    return shards


def layout_like(source: Checkpoint, layers: Iterable[int], dtype: torch.dtype) -> Layout:
    """The layout of the outer tensors of `source` and of new layers, each shaped like one of its `layers`."""
    layout = {name: TensorSpec(dtype, source.tensors[name].shape) for name in source.outer_tensor_names}
    for new, old in enumerate(layers):
        for name in source.layer_tensor_names(old):
            below = name.removeprefix(f"{source.arch.layer_name(old)}.")
            layout[source.arch.in_layer(new, below)] = TensorSpec(dtype, source.tensors[name].shape)
    return layout


def checksum_of(tensor: torch.Tensor) -> str:
    """xxh3_128 of a tensor's bytes: finds accidents, not malice."""
    return xxh3_128(tensor_bytes(tensor)).hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, as a safetensors file holds them."""
    flat: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def write_side_files(source: Checkpoint, folder: Path) -> None:
    """Copies what belongs to a checkpoint beside its weights."""
    copy_side_files(source.path, folder)


def _write(handle: int, place: int, data: memoryview) -> None:
    while data:
        count = os.pwrite(handle, data, place)
        data, place = data[count:], place + count


def _read(handle: int, place: int, size: int) -> Iterator[memoryview]:
    """Bytes of a file in blocks; one that is cut short gives fewer."""
    while size and (block := os.pread(handle, min(size, BLOCK), place)):
        yield memoryview(block)
        place, size = place + len(block), size - len(block)
