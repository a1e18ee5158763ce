"""What is learned: token ids, which predictions count, and the sequences that only measure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors.torch import load_file, save_file

from mkaq.calibrate.text import documents
from mkaq.calibrate.tokens import calibration_tokens
from mkaq.distill.chat import Message, chat_rows, conversations, has_conversations
from mkaq.errors import UsageError
from mkaq.fit.shuffle import probing_tokens

HELD_OUT = 16_384  # tokens at most


@dataclass(frozen=True)
class Text:
    """The sequences of a distillation.

    Attributes:
        tokens: Token ids, shape (samples, length), int32: those to learn from, then those held out, then
            as many of other text.
        learned: Which predictions count, of the same shape.
        train: How many are learned from.
    """

    tokens: torch.Tensor
    learned: torch.Tensor
    train: int

    @property
    def own(self) -> range:
        """The held-out sequences of the text that is learned."""
        return range(self.train, (self.train + len(self.tokens)) // 2)

    @property
    def other(self) -> range:
        """The sequences of other text."""
        return range(self.own.stop, len(self.tokens))

    def save(self, path: Path) -> None:
        """Writes it to a file."""
        train = torch.tensor(self.train)
        save_file({"input_ids": self.tokens, "learned": self.learned, "train": train}, path)

    @staticmethod
    def load(path: Path) -> "Text":
        """Reads a file of `save`."""
        tensors = load_file(path)
        return Text(tensors["input_ids"], tensors["learned"], int(tensors["train"]))


class Author(Protocol):
    """Writes what is learned; see `own_words`."""

    def continued(self, tokens: torch.Tensor) -> torch.Tensor:
        """Sequences of which it wrote all but the beginning."""

    def answered(self, talks: Sequence[Sequence[Message]]) -> Iterable[Sequence[Message]]:
        """Conversations whose last answer it wrote."""


class Wanted(NamedTuple):
    """What is read.

    Attributes:
        dataset: The data set's name in the recipe.
        path: Its file or folder.
        num_samples: Sequences, the held-out ones included.
        max_seq_length: Tokens per sequence.
        seed: Seed of the choice of sequences, and of random phrases.
    """

    dataset: str
    path: str | None
    num_samples: int
    max_seq_length: int
    seed: int

    @property
    def held_out(self) -> int:
        """The sequences that are held out: an eighth as many, and no more than measure well."""
        return max(1, min(self.num_samples // 8, HELD_OUT // self.max_seq_length))


def build_text(wanted: Wanted, gate: str | None, tokenizer: Any, author: Author | None = None) -> Text:
    """Reads the sequences to learn from, those held out, and other text.

    Args:
        wanted: What is read.
        gate: A text file or folder of the other text; None: random phrases of the held-out sequences' tokens.
        tokenizer: The source's.
        author: The source, if it writes what is learned.

    Raises:
        UsageError: If a text is missing or too short.
    """
    held, length, seed = wanted.held_out, wanted.max_seq_length, wanted.seed
    own, learned = _sequences(wanted, tokenizer, author)
    for what, part in {"held-out sequences": learned[-held:], "sequences to learn": learned[:-held]}.items():
        if not bool(part.any()):
            fix = "give more text, or set recover.text.num_samples higher"
            raise UsageError(f"no answer is in the {what}", where="recover.text", fix=fix)
    if gate is None:
        other = probing_tokens(own[-held:], seed)[held:]
    else:
        try:
            other = calibration_tokens(documents("text", gate, "calibrate"), tokenizer, held, length, seed)
        except UsageError as error:
            raise UsageError(error.what, where="recover.gate", fix="give a longer text") from None
    return with_other(own, learned, other)


def with_other(own: torch.Tensor, learned: torch.Tensor, other: torch.Tensor) -> Text:
    """Sequences of which the last ones are held out, and as many of other text, in which every prediction
    counts."""
    every = torch.ones_like(other, dtype=torch.bool)
    return Text(torch.cat([own, other]), torch.cat([learned, every]), len(own) - len(other))


def _sequences(wanted: Wanted, tokenizer: Any, author: Author | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and which predictions count."""
    size = wanted.num_samples, wanted.max_seq_length
    if wanted.dataset == "jsonl" and wanted.path and has_conversations(wanted.path):
        talks = conversations(wanted.path, wanted.seed)
        return chat_rows(author.answered(talks) if author else talks, tokenizer, *size)
    texts = documents(wanted.dataset, wanted.path, "calibrate")
    tokens = calibration_tokens(texts, tokenizer, *size, wanted.seed, where="recover.text")
    return author.continued(tokens) if author else tokens, torch.ones_like(tokens, dtype=torch.bool)
