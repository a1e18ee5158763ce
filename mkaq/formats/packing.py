"""The GPTQ checkpoint layout: integer codes as little-endian bit streams in int32 words.

`qweight` holds the codes of 32 input features in `bits` words, for every output feature; `qzeros` holds zero
points minus one, packed along the output features; `scales` is float16. This is the layout of auto-gptq,
which GPTQModel, optimum, transformers and vLLM read and mkaq writes. Version 2 (`gptq_v2`) differs only in
that zero points are stored unchanged.
"""

import torch

ROWS = 16_384  # output features of a large layer that are quantized or decoded at once


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs codes along the first dimension, lowest bits first.

    Args:
        codes: Integers in [0, 2**bits), shape (n, m), n a multiple of 32.
        bits: Bits per code, 1 to 31.

    Returns:
        int32, shape (n * bits / 32, m).

    Raises:
        ValueError: If n is not a multiple of 32.
    """
    count, width = codes.shape
    if count % 32:
        raise ValueError(f"{count} codes are not a multiple of 32")
    lanes = codes.reshape(count // 32, 32, width)
    words = torch.zeros(count // 32, bits, width, dtype=torch.int32, device=codes.device)
    for lane in range(32):
        word, shift = divmod(lane * bits, 32)
        value = lanes[:, lane].to(torch.int32)
        words[:, word] |= value << shift  # bits that do not fit are shifted out
        if shift + bits > 32:
            words[:, word + 1] |= value >> (32 - shift)
    return words.reshape(count // 32 * bits, width)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack`.

    Args:
        words: int32, shape (n * bits / 32, m).
        bits: Bits per code.

    Returns:
        int32 codes, shape (n, m).
    """
    rows, width = words.shape
    wide = words.to(torch.int64).reshape(rows // bits, bits, width) & 0xFFFFFFFF
    lanes = torch.empty(rows // bits, 32, width, dtype=torch.int32, device=words.device)
    for lane in range(32):
        word, shift = divmod(lane * bits, 32)
        value = wide[:, word] >> shift
        if shift + bits > 32:
            value |= wide[:, word + 1] << (32 - shift)
        lanes[:, lane] = (value & (2**bits - 1)).to(torch.int32)
    return lanes.reshape(rows // bits * 32, width)


def pack_linear(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, g_idx: torch.Tensor, bits: int
) -> dict[str, torch.Tensor]:
    """The tensors of a quantized linear layer.

    Args:
        codes: Integers in [0, 2**bits), shape (out_features, in_features).
        scales: float16, shape (out_features, groups).
        zeros: Zero points in [1, 2**bits], shape (out_features, groups). The format stores them minus one,
            and readers add one to whole words: a zero point of 0 would carry into its neighbour. mkaq's GPTQ
            solver never produces one.
        g_idx: The group of every input feature, shape (in_features,).
        bits: Bits per code.

    Returns:
        qweight, qzeros, scales and g_idx, on the CPU.
    """
    return {
        "qweight": pack(codes.T, bits).cpu(),
        "qzeros": pack((zeros - 1).to(torch.int32), bits).T.contiguous().cpu(),
        "scales": scales.T.to(torch.float16).contiguous().cpu(),
        "g_idx": g_idx.to(torch.int32).cpu(),
    }


def unpack_linear(tensors: dict[str, torch.Tensor], bits: int, form: str = "gptq") -> torch.Tensor:
    """The weight that a quantized linear layer represents: scale * (code - zero).

    Args:
        tensors: qweight, qzeros, scales and g_idx.
        bits: Bits per code.
        form: `gptq`, or `gptq_v2`, which does not store zero points minus one.

    Returns:
        float32, shape (out_features, in_features).

    Raises:
        ValueError: If `g_idx` names a group that does not exist.
    """
    zeros = unpack(tensors["qzeros"].T.contiguous(), bits).T + (form == "gptq")
    g_idx = tensors["g_idx"].long()
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= len(tensors["scales"]):
        raise ValueError(f"g_idx names groups beyond the {len(tensors['scales'])} that there are")
    scales, rows = tensors["scales"].float(), tensors["qweight"].shape[1]
    weight = torch.empty(rows, len(g_idx), device=scales.device)
    for start in range(0, rows, ROWS):
        part = slice(start, start + ROWS)
        steps = unpack(tensors["qweight"][:, part], bits) - zeros[:, part][g_idx]
        weight[part] = (steps.float() * scales[:, part][g_idx]).T
    return weight
