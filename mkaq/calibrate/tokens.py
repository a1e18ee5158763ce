"""Token ids from documents: calibration samples and evaluation sequences."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mkaq.errors import UsageError


def calibration_tokens(
    texts: Sequence[str],
    tokenizer: Any,
    num_samples: int,
    max_seq_length: int,
    seed: int,
    where: str = "calibration",
) -> torch.Tensor:
    """Cuts documents into pieces, shuffles them, and packs their tokens into full sequences.

    Args:
        texts: The documents.
        tokenizer: A tokenizer of transformers; its prefix of every text (BOS) begins every sequence.
        num_samples: The number of sequences.
        max_seq_length: Tokens per sequence.
        seed: The seed of the shuffle.
        where: The section of the recipe that asks for them.

    Returns:
        int32, shape (num_samples, max_seq_length).

    Raises:
        UsageError: If the texts have too few tokens; the message says how many there are.
    """
    prefix = _prefix(tokenizer)
    body = max_seq_length - len(prefix)
    size = _characters(max_seq_length)
    pieces = [text[start : start + size] for text in texts for start in range(0, len(text), size)]
    order = np.random.default_rng(seed).permutation(len(pieces))
    stream: list[int] = []
    for index in order:
        stream += _encode(tokenizer, pieces[index])
        if len(stream) >= num_samples * body:
            break
    else:
        enough = len(stream) // body
        raise UsageError(
            f"too little text: {len(stream):,} tokens found, {num_samples} samples of {max_seq_length} need "
            f"{num_samples * body:,}",
            where=where,
            fix="give more text" + (f", or set {where}.num_samples to {enough} or less" if enough else ""),
        )
    rows = [prefix + stream[i * body : (i + 1) * body] for i in range(num_samples)]
    return torch.tensor(rows, dtype=torch.int32)


def tokens_digest(tokens: torch.Tensor) -> str:
    """The sha256 of token ids as little-endian int32, sample after sample."""
    return hashlib.sha256(tokens.numpy().astype("<i4").tobytes()).hexdigest()


def evaluation_sequences(
    texts: Sequence[str], tokenizer: Any, max_seq_length: int, num_samples: int | None = None
) -> list[list[int]]:
    """The text, in order, as consecutive sequences; the last one may be shorter.

    Raises:
        UsageError: If the text does not fill one sequence.
    """
    prefix = _prefix(tokenizer)
    body = max_seq_length - len(prefix)
    stream: list[int] = []
    size = 200_000 if num_samples is None else min(200_000, _characters(num_samples * body))
    for piece in (text[start : start + size] for text in texts for start in range(0, len(text), size)):
        stream += _encode(tokenizer, piece)
        if num_samples is not None and len(stream) >= num_samples * body:
            stream = stream[: num_samples * body]
            break
    if len(stream) < body:
        raise UsageError(
            f"too little text to evaluate: {len(stream):,} tokens found, one sequence needs {body:,}",
            where="evaluate",
        )
    rows = [prefix + stream[start : start + body] for start in range(0, len(stream), body)]
    return [row for row in rows if len(row) > max(1, len(prefix))]


def _characters(tokens: int) -> int:
    """Of text that has as many tokens, and nearly always more: no text of megabytes is read for a few."""
    return max(4000, 8 * tokens)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text: BOS, or nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos] else []
