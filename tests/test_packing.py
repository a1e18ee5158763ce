"""The GPTQ checkpoint format, against auto-gptq's layout."""

import pytest
import torch

from mkaq.formats.packing import pack, pack_linear, unpack, unpack_linear
from mkaq.quantize.gptq import gptq


def codes(bits: int, rows: int = 64, columns: int = 5) -> torch.Tensor:
    return torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(bits))


def unsigned(words: torch.Tensor) -> list[int]:
    return [word & 0xFFFFFFFF for word in words.flatten().tolist()]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_unpack_undoes_pack(bits: int) -> None:
    words = pack(codes(bits), bits)
    assert words.dtype == torch.int32 and words.shape == (64 * bits // 32, 5)
    assert torch.equal(unpack(words, bits), codes(bits).int())
    full = torch.full((32, 1), 2**bits - 1)
    assert (pack(full, bits) == -1).all() and torch.equal(unpack(pack(full, bits), bits), full.int())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_words_hold_consecutive_codes_lowest_bits_first(bits: int) -> None:
    per_word = 32 // bits
    for number, word in enumerate(unsigned(pack(codes(bits)[:, :1], bits))):
        own = codes(bits)[number * per_word : (number + 1) * per_word, 0].tolist()
        assert word == sum(code << (bits * lane) for lane, code in enumerate(own))


def test_three_bit_words_laid_out_by_hand() -> None:
    """Codes 0 to 7 are 24 bits, bytes 88 C6 FA; four times: 88 C6 FA 88 | C6 FA 88 C6 | FA 88 C6 FA."""
    words = pack(torch.arange(32).reshape(32, 1) % 8, 3)
    assert unsigned(words) == [0x88FAC688, 0xC688FAC6, 0xFAC688FA]


def test_three_bit_words_are_those_of_auto_gptq() -> None:
    """Its QuantLinear.pack: 10 codes, one cut after 2 bits, 10, one cut after 1 bit, 10."""
    column, expected, row, i = codes(3)[:, 0].tolist(), [0] * 6, 0, 0
    while row < 6:
        for j in range(i, i + 10):
            expected[row] |= column[j] << (3 * (j - i))
        expected[row] |= (column[i + 10] << 30) & 0xFFFFFFFF
        expected[row + 1] |= (column[i + 10] >> 2) & 1
        for j in range(i + 11, i + 21):
            expected[row + 1] |= column[j] << (3 * (j - i - 11) + 1)
        expected[row + 1] |= (column[i + 21] << 31) & 0xFFFFFFFF
        expected[row + 2] |= (column[i + 21] >> 1) & 3
        for j in range(i + 22, i + 32):
            expected[row + 2] |= column[j] << (3 * (j - i - 22) + 2)
        row, i = row + 3, i + 32
    assert unsigned(pack(codes(3)[:, :1], 3)) == expected


def test_ragged_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="40 codes are not a multiple of 32"):
        pack(torch.zeros(40, 2, dtype=torch.int32), 4)


def test_symmetric_zero_points_are_stored_minus_one() -> None:
    zeros, scales = torch.full((32, 3), 8, dtype=torch.int32), torch.ones(32, 3)
    packed = pack_linear(torch.zeros(32, 96), scales, zeros, torch.arange(96) // 32, 4)
    assert packed["qzeros"].shape == (3, 4) and set(unsigned(packed["qzeros"])) == {0x77777777}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_linear_stands_for_scale_times_code_minus_zero(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    code, scales = codes(bits, 32, 96), torch.rand(32, 3, generator=generator).half()
    zeros = torch.randint(1, 2**bits, (32, 3), generator=generator)
    zeros[0] = 2**bits - 1
    g_idx = torch.randint(0, 3, (96,), generator=generator)
    packed = pack_linear(code, scales, zeros, g_idx, bits)
    assert {k: (v.dtype, tuple(v.shape)) for k, v in packed.items()} == {
        "qweight": (torch.int32, (96 * bits // 32, 32)),
        "qzeros": (torch.int32, (3, bits)),
        "scales": (torch.float16, (3, 32)),
        "g_idx": (torch.int32, (96,)),
    }
    assert torch.equal(unpack(packed["qweight"], bits), code.T)
    expected = torch.stack(
        [scales[:, g] * (code[:, c] - zeros[:, g]) for c, g in enumerate(g_idx.tolist())], 1
    )
    assert torch.allclose(unpack_linear(packed, bits), expected.float(), rtol=1e-3)
    assert all(tensor.is_contiguous() for tensor in packed.values())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_solved_weight_survives_the_format_exactly(bits: int, sym: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 64, generator=generator) + (0 if sym else 0.5)
    inputs = torch.randn(200, 64, generator=generator) * torch.linspace(1, 3, 64)
    result = gptq(weight, inputs.T @ inputs, bits=bits, group_size=16, sym=sym, desc_act=True)
    packed = pack_linear(result.codes, result.scales, result.zeros, result.g_idx, bits)
    assert not torch.equal(packed["g_idx"], packed["g_idx"].sort().values)  # scattered groups
    assert torch.equal(unpack_linear(packed, bits), result.weight)
