"""GPTQ codes as GGUF blocks: the same codes in another order, nothing is rounded.

A GPTQ weight is scale * (code - zero), with float16 scales; a GGUF block holds a float16 scale and small
integers. The types are those of ggml's `ggml-common.h`; which of them holds which codes exactly is
`exact_type`. A group of more columns than a block has becomes several blocks with the same scale.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Steps = NDArray[np.int16]
Scales = NDArray[np.float16]
Zeros = NDArray[np.int16]
SUPER = 256  # columns in a block of the K and T types


class Codes(NamedTuple):
    """A quantized weight.

    Attributes:
        steps: code - zero, int16, shape (out_features, in_features).
        scales: float16, shape (out_features, groups); a group is in_features / groups neighbouring columns.
        zeros: Zero points, shape (out_features, groups).
    """

    steps: Steps
    scales: Scales
    zeros: Zeros


def exact_type(bits: int, sym: bool, group_size: int, in_features: int) -> str | None:
    """The smallest GGUF type that holds the codes of a weight exactly; None if there is none.

    Args:
        bits: Bits per code.
        sym: Whether every zero point is the middle of the range.
        group_size: Neighbouring columns with one scale; -1 for all.
        in_features: Columns.
    """
    group = in_features if group_size == -1 else group_size
    if group % 32 or in_features % group:
        return None
    whole = group % SUPER == 0
    match bits, sym:
        case 2, True:
            return "TQ2_0" if whole else "Q2_0" if group % 64 == 0 else "Q4_0"
        case 2, False:
            return "Q2_K" if whole else "Q4_0"
        case 3, True:
            return "Q3_K" if whole else "Q4_0"
        case (3, False) | (4, True):
            return "Q4_0"
        case 4, False:
            return "Q5_0"
        case 8, True:
            return "Q8_0"
    return None


def blocks(codes: Codes, kind: str) -> Bytes:
    """The blocks of a weight.

    Args:
        codes: The weight.
        kind: A type that holds it, from `exact_type`.

    Returns:
        Shape (out_features, bytes per row).

    Raises:
        ValueError: If a code or a group does not fit the type.
    """
    size, low, high, encode = _TYPES[kind]
    rows, columns = codes.steps.shape
    group = columns // codes.scales.shape[1]
    if group % size or codes.steps.min() < low or codes.steps.max() > high:
        raise ValueError(f"codes {codes.steps.min()} to {codes.steps.max()} in groups of {group} as {kind}")
    steps = codes.steps.reshape(-1, size)
    scales = np.repeat(codes.scales, group // size, axis=1).reshape(-1, 1)
    zeros = np.repeat(codes.zeros, group // size, axis=1).reshape(-1, 1)
    return encode(steps, scales, zeros).reshape(rows, -1)


def _halves(values: Bytes) -> Bytes:
    """32 values of 4 bits: byte j holds value j and value j + 16."""
    return values[:, :16] | values[:, 16:] << np.uint8(4)


def _quarters(values: Bytes) -> Bytes:
    """256 values of 2 bits: in each half, byte j holds values j, j + 32, j + 64 and j + 96."""
    parts = values.reshape(-1, 2, 4, 32) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    joined: Bytes = np.bitwise_or.reduce(parts, axis=2)
    return joined.reshape(-1, 64)


def _half_bytes(scales: Scales) -> Bytes:
    return np.ascontiguousarray(scales, "<f2").view(np.uint8)


def _q4_0(steps: Steps, scales: Scales, zeros: Zeros) -> Bytes:
    return np.hstack([_half_bytes(scales), _halves((steps + 8).astype(np.uint8))])


def _q5_0(steps: Steps, scales: Scales, zeros: Zeros) -> Bytes:
    values = (steps + 16).astype(np.uint8)
    fifth = np.packbits(values >> np.uint8(4), axis=1, bitorder="little")
    return np.hstack([_half_bytes(scales), fifth, _halves(values & np.uint8(15))])


def _q8_0(steps: Steps, scales: Scales, zeros: Zeros) -> Bytes:
    return np.hstack([_half_bytes(scales), steps.astype(np.int8).view(np.uint8)])


def _q2_0(steps: Steps, scales: Scales, zeros: Zeros) -> Bytes:
    """Its values are -1 to 2, as those of TQ2_0; byte j holds values 4 j to 4 j + 3."""
    parts = (1 - steps).astype(np.uint8).reshape(-1, 16, 4) << np.array([0, 2, 4, 6], np.uint8)
    joined: Bytes = np.bitwise_or.reduce(parts, axis=2)
    return np.hstack([_half_bytes(-scales), joined])


def _tq2_0(steps: Steps, scales: Scales, zeros: Zeros) -> Bytes:
    """Its values are -1 to 2, those of GPTQ -2 to 1: both signs are turned."""
    return np.hstack([_quarters((1 - steps).astype(np.uint8)), _half_bytes(-scales)])


def _q2_k(steps: Steps, scales: Scales, zeros: Zeros) -> Bytes:
    """scale * 1 * code - scale * zero: d and dmin are the scale, the 4-bit factors 1 and the zero point."""
    factors = np.repeat((1 | zeros << 4).astype(np.uint8), 16, axis=1)
    ends = _half_bytes(scales)
    return np.hstack([factors, _quarters((steps + zeros).astype(np.uint8)), ends, ends])


def _q3_k(steps: Steps, scales: Scales, zeros: Zeros) -> Bytes:
    """Two low bits, then the third, set where nothing is subtracted; all 6-bit factors are 33, which is 1."""
    values = (steps + 4).astype(np.uint8)
    third = (values >> np.uint8(2)).reshape(-1, 8, 32) << np.arange(8, dtype=np.uint8)[:, None]
    factors = np.tile(np.array([0x11] * 8 + [0xAA] * 4, np.uint8), (len(values), 1))
    parts = [
        np.bitwise_or.reduce(third, axis=1),
        _quarters(values & np.uint8(3)),
        factors,
        _half_bytes(scales),
    ]
    return np.hstack(parts)


_TYPES = {  # columns of a block, the lowest and the highest code - zero, and how it is laid out
    "Q4_0": (32, -8, 7, _q4_0),
    "Q5_0": (32, -16, 15, _q5_0),
    "Q8_0": (32, -128, 127, _q8_0),
    "Q2_0": (64, -2, 1, _q2_0),
    "TQ2_0": (SUPER, -2, 1, _tq2_0),
    "Q2_K": (SUPER, -4, 3, _q2_k),
    "Q3_K": (SUPER, -4, 3, _q3_k),
}
