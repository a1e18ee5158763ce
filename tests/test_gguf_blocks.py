"""GPTQ codes as GGUF blocks, against the decoder of the gguf package."""

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from mkaq.export.gguf_blocks import Codes, blocks, exact_type
from mkaq.formats.gguf_types import Type, file_type

COLUMNS = 512
TYPES = {  # (bits, sym): the type of groups of 64 and 128, and of groups of 256 and a whole row
    (2, True): ("Q2_0", "TQ2_0"),
    (2, False): ("Q4_0", "Q2_K"),
    (3, True): ("Q4_0", "Q3_K"),
    (3, False): ("Q4_0", "Q4_0"),
    (4, True): ("Q4_0", "Q4_0"),
    (4, False): ("Q5_0", "Q5_0"),
    (8, True): ("Q8_0", "Q8_0"),
}


def random_codes(bits: int, sym: bool, group: int) -> Codes:
    rng = np.random.default_rng(bits)
    shape = (8, COLUMNS // group)
    codes = rng.integers(0, 2**bits, (8, COLUMNS))
    codes[:2, :2] = [[0, 2**bits - 1]]
    zeros = np.full(shape, 2 ** (bits - 1)) if sym else rng.integers(1, 2**bits + 1, shape)
    if not sym:
        zeros[:2, 0] = [1, 2**bits]
    scales = (rng.random(shape) * 0.01).astype(np.float16)
    scales[0, 0], scales[1, 0] = 6e-8, 0  # the smallest that float16 has, and none
    steps = (codes - np.repeat(zeros, group, axis=1)).astype(np.int16)
    return Codes(steps, scales, zeros.astype(np.int16))


def dequantize(data: NDArray[np.uint8], kind: str) -> NDArray[np.float32]:
    """As llama.cpp does it: by the gguf package, or for Q2_0 as in ggml-quants.c, a number at a time."""
    if kind != "Q2_0":
        return gguf.quants.dequantize(data, Type[kind])
    blocks = data.reshape(-1, 18)
    scales = blocks[:, :2].copy().view("<f2").astype(np.float32)
    codes = [blocks[:, 2 + at // 4] >> at % 4 * 2 & 3 for at in range(64)]
    return ((np.stack(codes, 1).astype(np.float32) - 1) * scales).reshape(len(data), -1)


@pytest.mark.parametrize("group", [32, 64, 128, 256, -1])
@pytest.mark.parametrize(("bits", "sym"), TYPES)
def test_blocks_decode_to_the_same_numbers(bits: int, sym: bool, group: int) -> None:
    kind = exact_type(bits, sym, group, COLUMNS)
    assert kind == ("Q4_0" if (bits, group) == (2, 32) else TYPES[bits, sym][group in (256, -1)])
    size = COLUMNS if group == -1 else group
    codes = random_codes(bits, sym, size)
    decoded = dequantize(blocks(codes, kind), kind)
    expected = codes.steps.astype(np.float32) * np.repeat(codes.scales.astype(np.float32), size, axis=1)
    assert np.array_equal(decoded, expected)


@pytest.mark.parametrize(
    ("bits", "sym", "group", "columns"),
    [(8, False, 32, 512), (4, True, 16, 512), (4, True, 48, 480), (4, True, -1, 80), (4, True, 128, 192)],
)
def test_what_fits_no_type_has_none(bits: int, sym: bool, group: int, columns: int) -> None:
    assert exact_type(bits, sym, group, columns) is None


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0", "Q2_0", "TQ2_0", "Q2_K", "Q3_K"])
def test_a_code_beyond_a_type_is_refused(kind: str) -> None:
    codes = random_codes(2, True, 256)
    codes.steps[3, 7] = 500
    with pytest.raises(ValueError, match="500"):
        blocks(codes, kind)


def test_groups_smaller_than_a_block_are_refused() -> None:
    with pytest.raises(ValueError, match="groups of 128"):
        blocks(random_codes(2, True, 128), "TQ2_0")


@pytest.mark.parametrize(
    ("kind", "number"), [("F32", 0), ("F16", 1), ("Q4_0", 2), ("Q3_K", 11), ("BF16", 32), ("Q2_0", 41)]
)
def test_a_file_of_a_type_has_the_number_of_llama_cpp(kind: str, number: int) -> None:
    assert file_type(Type[kind]) == number
