"""The safetensors writer: the library's own bytes, shards, and what happens when something fails."""

import hashlib
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mkaq.checkpoint import shard
from mkaq.checkpoint.layout import TensorSpec
from mkaq.checkpoint.writer import ShardWriter
from mkaq.errors import VerificationError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def mixed() -> dict[str, torch.Tensor]:
    """Tensors of several types, none two of one size, with sizes that leave no alignment to chance."""
    generator = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(3, 5, generator=generator),
        "é.codes": torch.arange(7, dtype=torch.uint8),
        "a.weight": torch.randn(5, 1, generator=generator).bfloat16(),
        "a.count": torch.tensor(9),
        "a.bias": torch.randn(3, generator=generator).bfloat16(),
        "c.empty": torch.zeros(0, 4),
        "a.codes": torch.arange(5, dtype=torch.uint8),
    }


def layout_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(
    folder: Path, tensors: dict[str, torch.Tensor], shard_size: int = 10**9, declared: bool = False
) -> Path:
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder, shard_size, layout_of(tensors) if declared else None) as output:
        for name, tensor in tensors.items():
            output.add(name, tensor)
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def numbered(count: int) -> dict[str, torch.Tensor]:
    """Tensors of 40 bytes each."""
    return {f"t{i}": torch.full((10,), float(i)) for i in range(count)}


@pytest.mark.parametrize("declared", [False, True])
def test_bytes_are_those_of_the_safetensors_library(tmp_path: Path, declared: bool) -> None:
    save_file(mixed(), tmp_path / "expected", metadata={"format": "pt"})
    written = bytes_of(write(tmp_path / "out", mixed(), declared=declared))
    assert written == {SINGLE: (tmp_path / "expected").read_bytes()}


def test_bytes_are_those_of_the_library_with_types_of_one_size(tmp_path: Path) -> None:
    """The types of a GPTQ checkpoint: int32 codes, float16 scales, other tensors in float32 or bfloat16."""
    types = ["int32", "float32", "float16", "bfloat16", "int64", "float64", "uint8", "int8"]
    tensors = {f"{i}": torch.arange(3).to(getattr(torch, name)) for i, name in enumerate(types)}
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    assert bytes_of(write(tmp_path / "out", tensors))[SINGLE] == (tmp_path / "expected").read_bytes()


def test_bytes_do_not_depend_on_the_order_of_arrival(tmp_path: Path) -> None:
    backwards = dict(reversed(list(mixed().items())))
    first, again, other = (
        write(tmp_path / n, t) for n, t in (("1", mixed()), ("2", mixed()), ("3", backwards))
    )
    assert bytes_of(first) == bytes_of(again) == bytes_of(other)


def test_strided_tensors_are_written_as_they_look(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    loaded = load_file(write(tmp_path / "out", {"t": tensor.T, "part": tensor[:, 1]}) / SINGLE)
    assert torch.equal(loaded["t"], tensor.T) and torch.equal(loaded["part"], tensor[:, 1])


@pytest.mark.parametrize("declared", [False, True])
def test_shards_are_filled_in_order_and_indexed(tmp_path: Path, declared: bool) -> None:
    folder = write(tmp_path / "out", numbered(5), shard_size=80, declared=declared)
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(bytes_of(folder)) == [*names, INDEX]
    expected = dict(
        zip([f"t{i}" for i in range(5)], [names[0]] * 2 + [names[1]] * 2 + [names[2]], strict=True)
    )
    index = json.loads((folder / INDEX).read_text())
    assert index == {"metadata": {"total_size": 200}, "weight_map": expected}
    for name, tensor in numbered(5).items():
        assert torch.equal(load_file(folder / expected[name])[name], tensor)
    assert [len(load_file(folder / name)) for name in names] == [2, 2, 1]
    for name in names:
        save_file(load_file(folder / name), tmp_path / "expected", metadata={"format": "pt"})
        assert (folder / name).read_bytes() == (tmp_path / "expected").read_bytes()


@pytest.mark.parametrize("declared", [False, True])
def test_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path, declared: bool) -> None:
    tensors = {"big": torch.ones(100), "a": torch.zeros(10), "huge": torch.ones(200)}
    folder = write(tmp_path / "out", tensors, shard_size=80, declared=declared)
    held = [sorted(load_file(folder / f"model-0000{i}-of-00003.safetensors")) for i in (1, 2, 3)]
    assert held == [["big"], ["a"], ["huge"]]


def test_shard_that_is_just_full_stays_single(tmp_path: Path) -> None:
    assert sorted(bytes_of(write(tmp_path / "out", numbered(2), shard_size=80))) == [SINGLE]
    assert len(bytes_of(write(tmp_path / "more", numbered(2), shard_size=79))) == 3


@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize("shard_size", [80, 10**9])
@pytest.mark.parametrize("place", [-1, 9])
def test_byte_that_the_disk_changes_is_not_in_the_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_size: int, declared: bool, place: int
) -> None:
    expected = bytes_of(write(tmp_path / "good", numbered(4), shard_size, declared))

    def corrupt(handle: int) -> None:
        os.pwrite(handle, b"\x11", place % os.fstat(handle).st_size)

    monkeypatch.setattr(shard.os, "fdatasync", corrupt)
    (tmp_path / "out").mkdir()
    with ShardWriter(tmp_path / "out", shard_size, layout_of(numbered(4)) if declared else None) as output:
        for name, tensor in numbered(4).items():
            output.add(name, tensor)
    for name, digest in output.digests.items():
        assert digest == hashlib.sha256(expected[name]).hexdigest()
        assert digest != hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest()


@pytest.mark.parametrize("how", ["changed", "cut short"])
def test_tensor_that_was_written_before_its_turn_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    def corrupt(handle: int) -> None:
        end = os.fstat(handle).st_size
        os.pwrite(handle, b"\x11", end - 1) if how == "changed" else os.truncate(handle, end - 1)
        corrupted.set()

    corrupted = threading.Event()
    monkeypatch.setattr(shard, "_STEP", 1)
    monkeypatch.setattr(shard.os, "fdatasync", corrupt)
    with (
        pytest.raises(VerificationError, match=r"tensor t3 reads back changed"),
        ShardWriter(tmp_path, 10**9, layout_of(numbered(4))) as output,
    ):
        for name, tensor in reversed(numbered(4).items()):
            output.add(name, tensor)
            assert corrupted.wait(30)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("step", [1, 80, 10**9])
def test_digest_does_not_depend_on_the_order_of_arrival(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(shard, "_STEP", step)
    orders = {"in order": [0, 1, 2, 3, 4], "backwards": [4, 3, 2, 1, 0], "mixed": [1, 0, 4, 2, 3]}
    for order, numbers in orders.items():
        (tmp_path / order).mkdir()
        with ShardWriter(tmp_path / order, 10**9, layout_of(numbered(5))) as output:
            for number in numbers:
                output.put(f"t{number}", torch.full((10,), float(number)).split(3))
        data = (tmp_path / order / SINGLE).read_bytes()
        assert output.digests == {SINGLE: hashlib.sha256(data).hexdigest()}


def test_memory_of_a_tensor_is_the_callers_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was handed over is hashed when `add` returns, though a thread beside does it."""
    tensor = torch.empty(10_000_000)
    with ShardWriter(tmp_path, 10**9, layout_of({"a": tensor, "b": tensor, "c": tensor})) as output:
        for number, name in enumerate("abc"):
            output.add(name, tensor.fill_(number))
    assert output.digests == {SINGLE: hashlib.sha256((tmp_path / SINGLE).read_bytes()).hexdigest()}


class Slow:
    """A sha256 that does nothing until it may."""

    def __init__(self, data: bytes) -> None:
        self._begun, self.may = hashlib.sha256(data), threading.Event()

    def update(self, data: memoryview) -> None:
        assert self.may.wait(30)
        self._begun.update(data)

    def hexdigest(self) -> str:
        return self._begun.hexdigest()


@pytest.mark.parametrize("waiting", [0, 80, 10**9])
@pytest.mark.parametrize("changed", [False, True])
def test_what_comes_faster_than_it_is_hashed_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waiting: int, changed: bool
) -> None:
    """Writing does not wait for it; a change on the disk is found, but in what waited in memory."""
    made: list[Slow] = []

    def slow(data: bytes) -> Slow:
        made.append(Slow(data))
        return made[-1]

    monkeypatch.setattr(shard, "sha256", slow)
    monkeypatch.setattr(shard, "_WAITING", waiting)

    def run() -> None:
        with ShardWriter(tmp_path, 10**9, layout_of(numbered(3))) as output:
            for name, tensor in numbered(3).items():
                output.put(name, tensor.split(2))
            if changed:
                part = tmp_path / ".part-0"
                part.write_bytes(part.read_bytes()[:-1] + b"\x11")
            made[0].may.set()
        held = (tmp_path / SINGLE).read_bytes()
        assert (output.digests == {SINGLE: hashlib.sha256(held).hexdigest()}) != changed

    if changed and waiting < 10**9:
        with pytest.raises(VerificationError, match=r"tensor t2 reads back changed"):
            run()
    else:
        run()


def test_sync_that_fails_once_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system reports a lost write to one sync, and none to the next."""
    monkeypatch.setattr(shard, "_STEP", 1)
    calls: list[int] = []

    def once(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 1:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(shard.os, "fdatasync", once)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path / "out", numbered(4), declared=True)
    assert len(calls) > 1 and not list((tmp_path / "out").glob("*.safetensors"))


def test_disk_that_is_full_at_the_sync_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard.os, "fdatasync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "out", numbered(4), 80, declared=True)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_exception_takes_the_spool_away_and_passes_on(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), ShardWriter(tmp_path, 80) as output:
        for name, tensor in numbered(3).items():
            output.add(name, tensor)
        assert (tmp_path / ".spool").exists()
        raise RuntimeError("stop")
    left = bytes_of(tmp_path)
    assert ".spool" not in left and INDEX not in left
    assert not [name for name in left if name.endswith(".safetensors")]


def test_layout_lets_tensors_come_in_any_order_and_in_pieces(tmp_path: Path) -> None:
    expected = bytes_of(write(tmp_path / "expected", numbered(5), shard_size=80))
    (tmp_path / "out").mkdir()
    with ShardWriter(tmp_path / "out", 80, layout_of(numbered(5))) as output:
        for name, tensor in reversed(numbered(5).items()):
            output.put(name, torch.split(tensor, 3))
    assert bytes_of(tmp_path / "out") == expected


def test_file_has_its_size_from_the_first_tensor_on(tmp_path: Path) -> None:
    """So that a disk that is too small says so at once."""
    with ShardWriter(tmp_path, 10**9, layout_of(numbered(3))) as output:
        output.add("t0", torch.zeros(10))
        part = (tmp_path / ".part-0").stat()
        assert part.st_blocks * 512 >= part.st_size
        for name in ("t1", "t2"):
            output.add(name, torch.zeros(10))
    assert (tmp_path / SINGLE).stat().st_size == part.st_size


def test_layout_needs_no_scratch_file(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 10**9, layout_of(mixed())) as output:
        for name, tensor in mixed().items():
            output.add(name, tensor)
            assert [path.name for path in tmp_path.iterdir()] == [".part-0"]
        assert (tmp_path / ".part-0").read_bytes()[8:].startswith(b'{"__metadata__"')


def test_tensors_must_come_as_the_layout_says(tmp_path: Path) -> None:
    layout = layout_of(numbered(2))
    with pytest.raises(ValueError, match="1 tensors of the layout never came, such as t1"):
        write_parts(tmp_path, layout, {"t0": [torch.zeros(10)]})
    with pytest.raises(ValueError, match="t2 is not in the layout"):
        write_parts(tmp_path, layout, {"t2": [torch.zeros(10)]})
    for pieces, bytes_more in (([torch.zeros(9)], "-4"), ([torch.zeros(6), torch.zeros(6)], r"\+8")):
        with pytest.raises(ValueError, match=f"{bytes_more} bytes more than the layout says"):
            write_parts(tmp_path, layout, {"t0": pieces})
    for tensor in (torch.zeros(5, 2), torch.zeros(10, dtype=torch.int32), torch.zeros(11)):
        with (
            pytest.raises(ValueError, match="unlike in the layout"),
            ShardWriter(tmp_path, 99, layout) as out,
        ):
            out.add("t0", tensor)
    assert not list(tmp_path.glob("*.safetensors"))


def write_parts(folder: Path, layout: dict[str, TensorSpec], parts: dict[str, list[torch.Tensor]]) -> None:
    with ShardWriter(folder, 10**9, layout) as output:
        for name, pieces in parts.items():
            output.put(name, pieces)


@pytest.mark.parametrize("declared", [False, True])
def test_tensor_that_comes_twice_is_refused(tmp_path: Path, declared: bool) -> None:
    layout = layout_of(numbered(1)) if declared else None
    with pytest.raises(ValueError, match="t0 is written twice"), ShardWriter(tmp_path, 99, layout) as output:
        output.add("t0", torch.zeros(10))
        output.add("t0", torch.zeros(10))


@pytest.mark.parametrize("shard_size", [80, 10**9])
def test_digests_are_those_of_the_files(tmp_path: Path, shard_size: int) -> None:
    with ShardWriter(tmp_path, shard_size, layout_of(numbered(5))) as output:
        for name, tensor in numbered(5).items():
            output.add(name, tensor)
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.glob("*tensors")}
    assert output.digests == files and len(files) == (3 if shard_size == 80 else 1)


def test_full_shard_is_synced_beside_while_the_next_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fsync = threading.Event(), os.fsync

    def sync(handle: int) -> None:
        assert threading.current_thread() is not threading.main_thread()
        fsync(handle)
        synced.set()

    monkeypatch.setattr(shard.os, "fdatasync", sync)
    with ShardWriter(tmp_path, 80, layout_of(numbered(3))) as output:
        output.add("t0", torch.zeros(10))
        output.add("t1", torch.zeros(10))
        assert synced.wait(30)
        output.add("t2", torch.zeros(10))
