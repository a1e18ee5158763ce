"""Whatever writes text: a checkpoint in torch, or a GGUF file in llama.cpp."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from mkaq.errors import UsageError
from mkaq.generate.pace import Pace
from mkaq.generate.sampling import Sampling

Show = Callable[[str], None]
"""Takes pieces of a text as they come."""
Message = dict[str, str]
"""One of a conversation: its `role` and its `content`."""


class Reply(NamedTuple):
    """What a model wrote, how fast, and whether it stopped because its context is full."""

    text: str
    pace: Pace
    full: bool


def no_tokens() -> UsageError:
    """The error for an empty prompt."""
    return UsageError("the prompt has no tokens", where="PROMPT", fix="give it a word")


def too_long(tokens: int, context: int, where: object) -> UsageError:
    """The error for a prompt, or a conversation, beyond the context."""
    what = f"{tokens} tokens do not fit into the model's context of {context}"
    return UsageError(what, where=where, fix="shorten the text")


class Writer(Protocol):
    """A model that writes."""

    @property
    def talks(self) -> bool:
        """Whether it has a chat template."""

    def complete(self, prompt: str, max_new_tokens: int, show: Show) -> Reply:
        """Continues a text.

        Raises:
            UsageError: If the prompt has no tokens, or too many.
        """

    def answer(self, messages: Sequence[Message], max_new_tokens: int, show: Show) -> Reply:
        """The next message of a conversation, in the model's own chat template.

        Raises:
            UsageError: If the template fails, or the conversation is too long.
        """


def writer_of(model: str, device: str, sampling: Sampling) -> Writer:
    """The writer for a folder, a hub id, a built-in model or a GGUF file."""
    if model.endswith(".gguf"):
        from mkaq.generate.llamacpp import LlamaCppWriter

        return LlamaCppWriter(Path(model), device, sampling)
    from mkaq.generate.in_torch import TorchWriter

    return TorchWriter.of(model, device, sampling)
