"""GPTQ codes as GGUF blocks, against the decoder of the gguf package."""

import gguf
import numpy as np
import pytest

from mkaq.export.gguf_blocks import Codes, blocks, exact_type

COLUMNS = 512
TYPES = {  # (bits, sym): the type of groups of 32, 64 and 128, and of groups of 256 and a whole row
    (2, True): ("Q4_0", "TQ2_0"),
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


@pytest.mark.parametrize("group", [32, 64, 128, 256, -1])
@pytest.mark.parametrize(("bits", "sym"), TYPES)
def test_blocks_decode_to_the_same_numbers(bits: int, sym: bool, group: int) -> None:
    kind = exact_type(bits, sym, group, COLUMNS)
    assert kind == TYPES[bits, sym][group in (256, -1)]
    size = COLUMNS if group == -1 else group
    codes = random_codes(bits, sym, size)
    decoded = gguf.quants.dequantize(blocks(codes, kind), gguf.GGMLQuantizationType[kind])
    expected = codes.steps.astype(np.float32) * np.repeat(codes.scales.astype(np.float32), size, axis=1)
    assert np.array_equal(decoded, expected)


@pytest.mark.parametrize(
    ("bits", "sym", "group", "columns"),
    [(8, False, 32, 512), (4, True, 16, 512), (4, True, 48, 480), (4, True, -1, 80), (4, True, 128, 192)],
)
def test_what_fits_no_type_has_none(bits: int, sym: bool, group: int, columns: int) -> None:
    assert exact_type(bits, sym, group, columns) is None


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0", "TQ2_0", "Q2_K", "Q3_K"])
def test_a_code_beyond_a_type_is_refused(kind: str) -> None:
    codes = random_codes(2, True, 256)
    codes.steps[3, 7] = 500
    with pytest.raises(ValueError, match="500"):
        blocks(codes, kind)


def test_groups_smaller_than_a_block_are_refused() -> None:
    with pytest.raises(ValueError, match="groups of 128"):
        blocks(random_codes(2, True, 128), "TQ2_0")
