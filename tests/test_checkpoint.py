"""Reading parts of a checkpoint: tensors in pieces, rows of a matrix, and the check that all is finite."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mkaq.checkpoint import reader, validate
from mkaq.checkpoint.reader import Checkpoint, TensorInfo
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.errors import CheckpointError

EMBEDDING = "model.embed_tokens.weight"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def lone(folder: Path, tensor: torch.Tensor) -> Checkpoint:
    """A checkpoint of one tensor, `t`, that lies behind another one."""
    save_file({"a": torch.ones(3, dtype=torch.float64), "t": tensor}, folder / "t.safetensors")
    header = validate._read_header(folder, "t.safetensors")
    return Checkpoint(folder, {}, header)


def test_headers_say_where_tensors_begin(tiny: Path) -> None:
    source = open_checkpoint(tiny)
    data = (tiny / "model.safetensors").read_bytes()
    for name, tensor in load_file(tiny / "model.safetensors").items():
        info = source.tensors[name]
        assert data[info.start :][: info.nbytes] == tensor.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("block", [64, 1 << 20])
def test_pieces_make_the_tensor(tiny: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(reader, "BLOCK", block)
    source = open_checkpoint(tiny)
    for name, tensor in load_file(tiny / "model.safetensors").items():
        pieces = list(source.blocks(name))
        assert torch.equal(torch.cat(pieces), tensor.reshape(-1))
        assert {piece.nbytes for piece in pieces[:-1]} <= {block} and 0 < pieces[-1].nbytes <= block


def test_tensor_without_values_is_one_empty_piece(tmp_path: Path) -> None:
    assert [piece.shape for piece in lone(tmp_path, torch.zeros(0, 4)).blocks("t")] == [(0,)]


def test_rows_are_those_asked_for_and_no_others_are_read(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, read, bytes_read = open_checkpoint(tiny), reader._read_at, []

    def noted(handle: int, start: int, tensor: torch.Tensor, where: Path) -> None:
        bytes_read.append(tensor.nbytes)
        read(handle, start, tensor, where)

    monkeypatch.setattr(reader, "_read_at", noted)
    whole = load_file(tiny / "model.safetensors")[EMBEDDING]
    rows = torch.tensor([7, 0, len(whole) - 1, 7])
    found = source.read_rows(EMBEDDING, rows)
    assert found.dtype == torch.bfloat16 and torch.equal(found, whole[rows])
    assert sum(bytes_read) == found.nbytes
    assert source.read_rows(EMBEDDING, rows[:0]).shape == (0, whole.shape[1])


@pytest.mark.parametrize("row", [-1, 4096])
def test_row_that_is_not_there(tiny: Path, row: int) -> None:
    with pytest.raises(IndexError, match=f"4096 rows, and no row {row}"):
        open_checkpoint(tiny).read_rows(EMBEDDING, torch.tensor([row]))


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(
    tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    for place in (0, 1, 31, 100, 159):  # in full vectors and behind the last
        tensor = torch.randn(160, generator=torch.Generator().manual_seed(0)).to(dtype)
        tensor[place] = value
        source = lone(tmp_path, tensor.reshape(16, 10))
        for reading in (
            lambda source=source: source.read(["t"]),
            lambda source=source: list(source.blocks("t")),
            lambda source=source, place=place: source.read_rows("t", torch.tensor([place // 10])),
        ):
            with pytest.raises(CheckpointError, match="tensor t holds NaN or infinity"):
                reading()


def test_rows_that_are_not_asked_for_may_be_anything(tmp_path: Path) -> None:
    tensor = torch.full((3, 4), float("nan"))
    tensor[1] = 5
    assert lone(tmp_path, tensor).read_rows("t", torch.tensor([1])).tolist() == [[5.0] * 4]


def test_largest_numbers_are_finite(tmp_path: Path) -> None:
    for dtype in DTYPES.values():
        tensor = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype)
        assert torch.equal(lone(tmp_path, tensor).read(["t"])["t"], tensor)


def test_file_that_is_cut_short_or_gone_meanwhile(tmp_path: Path) -> None:
    source = lone(tmp_path, torch.ones(4, 4))
    file = tmp_path / "t.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"t.safetensors: is cut short"):
        list(source.blocks("t"))
    with pytest.raises(CheckpointError, match="is cut short"):
        source.read_rows("t", torch.tensor([3]))
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        next(source.blocks("t"))
    missing = Checkpoint(tmp_path, {}, {"a": TensorInfo("t.safetensors", "F32", (1,), 0)})
    with pytest.raises(CheckpointError, match="tensor t is missing"):
        next(missing.blocks("t"))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(5, 7),
        torch.arange(6, dtype=torch.int32).reshape(2, 3),
        torch.arange(-4, 4, dtype=torch.int8),
        torch.tensor(3, dtype=torch.uint8),
        torch.randn(9).bfloat16(),
    ],
    ids=["float32", "int32", "int8", "scalar", "bfloat16"],
)
def test_a_tensor_is_read_as_it_was_written(tensor: torch.Tensor, tmp_path: Path) -> None:
    found = lone(tmp_path, tensor).read(["t"])["t"]
    assert found.dtype == tensor.dtype and torch.equal(found, tensor)


def test_header_of_a_file_larger_than_memory(tmp_path: Path) -> None:
    path, size = tmp_path / "t.safetensors", 2**42
    header = b'{"t":{"dtype":"BF16","shape":[%d],"data_offsets":[0,%d]}}' % (size // 2, size)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        try:
            file.truncate(8 + len(header) + size)
        except OSError:
            pytest.skip("no sparse file of 4 TiB here")
    found = validate._read_header(tmp_path, path.name)["t"]
    assert found == TensorInfo("t.safetensors", "BF16", (size // 2,), 8 + len(header))
