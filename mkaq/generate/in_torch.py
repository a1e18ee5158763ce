"""A checkpoint that writes: its whole model in memory, run by transformers' own code."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer

from mkaq.calibrate.tokenizer import chat_tokens, load_tokenizer
from mkaq.checkpoint.end_tokens import end_tokens
from mkaq.checkpoint.resolve import resolve_model
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.generate.choice import chooser
from mkaq.generate.pace import Pace
from mkaq.generate.sampling import Sampling
from mkaq.generate.stream import stream
from mkaq.generate.writer import Message, Reply, Show, no_tokens, too_long
from mkaq.walk.device import compute_dtype, pick_device
from mkaq.walk.whole_model import whole_model


@dataclass(frozen=True)
class TorchWriter:
    """Implements `Writer`.

    Attributes:
        where: What the model is called.
        model: The result of `whole_model`.
        tokenizer: Its tokenizer.
        stop: The tokens that end a text.
        device: Where it runs.
        choose: From logits to a token.
        positions: The tokens that its context has room for.
    """

    where: str
    model: Any
    tokenizer: Any
    stop: set[int]
    device: torch.device
    choose: Callable[[torch.Tensor], int]
    positions: int

    @classmethod
    def of(cls, model: str, device: str, sampling: Sampling) -> "TorchWriter":
        """Loads a folder, a hub id or a built-in model."""
        checkpoint, place = open_checkpoint(resolve_model(model), quantized=True), pick_device(device)
        tokenizer = load_tokenizer(checkpoint.path)
        whole = whole_model(checkpoint, place, compute_dtype(checkpoint.dtype, place))
        stop = end_tokens(checkpoint.path, tokenizer)
        positions = checkpoint.sizes.positions
        return cls(model, whole, tokenizer, stop, place, chooser(sampling), positions)

    @property
    def talks(self) -> bool:
        """Whether it has a chat template."""
        return bool(self.tokenizer.chat_template)

    def complete(self, prompt: str, max_new_tokens: int, show: Show) -> Reply:
        """Continues a text; see `Writer`."""
        ids = self.tokenizer(prompt)["input_ids"]
        if not ids:
            raise no_tokens()
        return self._say(ids, max_new_tokens, show)

    def answer(self, messages: Sequence[Message], max_new_tokens: int, show: Show) -> Reply:
        """Answers in a conversation; see `Writer`."""
        return self._say(chat_tokens(self.tokenizer, messages, self.where), max_new_tokens, show)

    def _say(self, ids: list[int], limit: int, show: Show) -> Reply:
        room = self.positions - len(ids)
        if room < 1:
            raise too_long(len(ids), self.positions, self.where)
        pace, printer, new = Pace(), _Pieces(self.tokenizer, show), list[int]()
        inputs = torch.tensor([ids], device=self.device)
        for token in stream(self.model, inputs, min(limit, room), self.stop, self.choose, pace):
            new.append(token)
            printer.put(torch.tensor([token]))
        printer.end()
        return Reply(self.tokenizer.decode(new), pace, full=len(new) == room < limit)


class _Pieces(TextStreamer):  # type: ignore[misc]
    """Shows text as soon as no later token can change it."""

    def __init__(self, tokenizer: Any, show: Show) -> None:
        super().__init__(tokenizer)
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """What transformers calls with each piece."""
        self._show(text)
