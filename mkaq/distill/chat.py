"""Conversations as text to learn: through the model's chat template, and only the answers count."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mkaq.calibrate.text import jsonl_values
from mkaq.calibrate.tokenizer import chat_tokens
from mkaq.errors import UsageError
from mkaq.paths import user_path

Message = Mapping[str, str]
ASSISTANT = "assistant"


def has_conversations(path: str) -> bool:
    """Whether the first line of a jsonl file or folder holds `messages`.

    Raises:
        UsageError: If it cannot be read.
    """
    first = next(jsonl_values(user_path(path), "messages"), None)
    return first is not None and first[-1] is not None


def conversations(path: str, seed: int) -> list[list[Message]]:
    """The `messages` of each line, up to the last answer, in random order.

    Raises:
        UsageError: If a line has none, or they are not of roles and texts.
    """
    found = [
        _answered(given, number, file) for file, number, given in jsonl_values(user_path(path), "messages")
    ]
    return [found[at] for at in np.random.default_rng(seed).permutation(len(found))]


def chat_rows(
    talks: Iterable[Sequence[Message]], tokenizer: Any, count: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packs conversations into full sequences.

    Args:
        talks: The conversations.
        tokenizer: A tokenizer of transformers.
        count: The number of sequences.
        length: Tokens per sequence.

    Returns:
        Token ids, int32, and which predictions are of answers; both of shape (count, length).

    Raises:
        UsageError: If there is no chat template, or too little text.
    """
    stream, answers = list[int](), list[bool]()
    for talk in talks:
        ids, spoken = encoded(talk, tokenizer)
        stream += ids
        answers += spoken
        if len(stream) > count * length:
            break
    else:
        enough = max(0, len(stream) - 1) // length
        raise UsageError(
            f"too little text: {len(stream):,} tokens found, {count} samples of {length} need "
            f"{count * length + 1:,}",
            where="recover.text",
            fix="give more conversations"
            + (f", or set recover.text.num_samples to {enough} or less" if enough else ""),
        )
    tokens = torch.tensor(stream[: count * length], dtype=torch.int32)
    predicted = torch.tensor(answers[1 : count * length + 1])  # after each token, the next one
    return tokens.view(count, length), predicted.view(count, length)


def encoded(talk: Sequence[Message], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation, and which of them an answer consists of, its end token included.

    Raises:
        UsageError: If the template writes the beginning of a conversation otherwise once more follows.
    """
    ids = templated(talk, tokenizer, ask=False)
    spoken = [False] * len(ids)
    for turn, message in enumerate(talk):
        if message["role"] == ASSISTANT:
            before = templated(talk[:turn], tokenizer, ask=True)
            after = templated(talk[: turn + 1], tokenizer, ask=False)
            if ids[: len(after)] != after or after[: len(before)] != before:
                what = "the chat template writes an answer otherwise once more of the conversation follows"
                fix = "give conversations of one question and one answer"
                raise UsageError(what, where="recover.text", fix=fix)
            spoken[len(before) : len(after)] = [True] * (len(after) - len(before))
    return ids, spoken


def templated(talk: Sequence[Message], tokenizer: Any, *, ask: bool) -> list[int]:
    """The tokens of a conversation, and with `ask` of the beginning of an answer to it.

    Raises:
        UsageError: If the chat template is missing, or fails.
    """
    check_template(tokenizer)
    return chat_tokens(tokenizer, talk, "recover.text", ask=ask)


def check_template(tokenizer: Any) -> None:
    """Checks that there is a chat template.

    Raises:
        UsageError: If there is none.
    """
    if not getattr(tokenizer, "chat_template", None):
        fix = "give text, or a tokenizer with a chat template"
        raise UsageError("the model has no chat template for `messages`", where="recover.text", fix=fix)


def _answered(messages: Any, number: int, file: Path) -> list[Message]:
    """The messages up to the last answer."""
    whole = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    last = max((n for n, m in enumerate(messages) if m["role"] == ASSISTANT), default=0) if whole else 0
    if not last:
        what = f"line {number} has no `messages` of roles and texts in which the assistant answers"
        raise UsageError(what, where=file)
    return [{"role": m["role"], "content": m["content"]} for m in messages[: last + 1]]
