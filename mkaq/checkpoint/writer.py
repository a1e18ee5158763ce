"""Writes a checkpoint's weights: safetensors files and their index, deterministic to the byte."""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch

from mkaq.checkpoint.layout import Layout, TensorSpec, fill_shards
from mkaq.checkpoint.reader import INDEX, SINGLE
from mkaq.checkpoint.shard import Shard, read_at, tensor_bytes
from mkaq.files import write_json
from mkaq.ranks import Ranks


class ShardWriter:
    """Writes tensors to safetensors files as they come, with at most one in memory.

    With a layout, every tensor goes straight to its offset, in any order and, if need be, in pieces. Without
    a layout, tensors are spooled to a scratch file until a shard is full.

    Tensors lie in a shard as in the safetensors library: the largest dtype first, then by name, so that each
    is aligned. The first tensor gives a file its full size, so a full disk is noticed at once, and a sync
    does not wait for the size to change.

    One thread hashes files from memory while they are written; another syncs them to disk. A tensor that
    comes before its turn, or faster than it can be hashed, is read back from disk and hashed when its turn
    comes. If its checksum has changed, leaving the `with` block fails.

    Args:
        folder: Where the files go.
        shard_size: Maximum data bytes of a file; a larger tensor gets its own.
        layout: Every tensor that will come, in the order in which shards are filled.

    Attributes:
        total_size: Data bytes written.
        digests: sha256 of every weight file by name, once the `with` block is left.

    Raises:
        ValueError: If the tensors do not match the layout.
        VerificationError: If a tensor reads back changed.
    """

    def __init__(self, folder: Path, shard_size: int, layout: Layout | None = None) -> None:
        self.folder, self.shard_size = folder, shard_size
        self.total_size = 0
        self.digests: dict[str, str] = {}
        self._names: set[str] = set()
        self._shards: list[Shard] = []
        self._hashing, self._syncing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._spool = None if layout is not None else (folder / ".spool").open("w+b")
        self._pending: dict[str, tuple[TensorSpec, int]] = {}
        for specs in fill_shards(layout or {}, shard_size):
            self._new_shard(specs)
        self._shard_of = {name: shard for shard in self._shards for name in shard.specs}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Adds a tensor, from any device and in its own dtype.

        Raises:
            ValueError: If the name was added before, or the layout does not have it with this dtype and
                shape.
        """
        spec = TensorSpec(tensor.dtype, tuple(tensor.shape))
        if self._spool is None:
            if name in self._shard_of and self._shard_of[name].specs[name] != spec:
                raise ValueError(f"tensor {name} is {spec}, unlike in the layout")
            self.put(name, [tensor])
            self._shard_of[name].hashed()  # the caller may reuse the tensor's memory
            return
        self._note(name, spec)
        if self._pending and self._spool.tell() + spec.nbytes > self.shard_size:
            self._close_spool()
        self._pending[name] = (spec, self._spool.tell())
        self._spool.write(tensor_bytes(tensor))

    def put(self, name: str, pieces: Iterable[torch.Tensor]) -> str:
        """Writes one tensor of the layout, given in pieces: flat, in order, in its own dtype.

        Pieces must not change later: they may be hashed after this returns.

        Returns:
            The `checksum_of` the tensor.

        Raises:
            ValueError: If the name was added before or is not in the layout, or the pieces have another size.
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

    def _new_shard(self, specs: Layout) -> Shard:
        path = self.folder / f".part-{len(self._shards)}"
        self._shards.append(Shard(path, specs, self._hashing, self._syncing))
        return self._shards[-1]

    def _close_spool(self) -> None:
        assert self._spool is not None
        self._spool.flush()
        shard = self._new_shard({name: spec for name, (spec, _) in self._pending.items()})
        for name, (spec, start) in self._pending.items():
            shard.write(name, read_at(self._spool.fileno(), start, spec.nbytes))
        self._pending.clear()
        self._spool.seek(0)
        self._spool.truncate()

    def _publish(self) -> None:
        """Waits until every file is on disk; then renames all of them and writes the index."""
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


class NoWriter:
    """Stands in for `ShardWriter` in all processes but the first: accepts the same calls, writes nothing."""

    digests: Mapping[str, str] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Does nothing."""

    def put(self, name: str, pieces: Iterable[torch.Tensor]) -> str:
        """Does nothing: consumes no piece, and returns an empty string instead of a checksum."""
        return ""

    def __enter__(self) -> "NoWriter":
        return self

    def __exit__(self, *_: object) -> None: ...


Writer = ShardWriter | NoWriter


def writer_of(ranks: Ranks, folder: Path, shard_size: int, layout: Layout | None = None) -> Writer:
    """The writer of this process: only the first process of a group writes."""
    return ShardWriter(folder, shard_size, layout) if ranks.main else NoWriter()
