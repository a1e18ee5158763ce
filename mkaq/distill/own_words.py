"""Text that the source writes itself: learned from it, a model drifts least (arXiv 2410.09982).

The whole source is in memory, and samples from its own predictions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mkaq.distill.chat import Message, templated
from mkaq.progress import Progress

BATCH = 16  # texts written at a time
GIVEN = 4  # of a sequence of plain text the first of so many parts is given


@dataclass(frozen=True)
class SourceAuthor:
    """Implements `text.Author`.

    Attributes:
        model: The source, of transformers.
        tokenizer: Its tokenizer.
        end: The tokens that end an answer.
        longest: Tokens of an answer at most.
        seed: Seed of the choice of tokens.
        progress: Shows every batch.
    """

    model: Any
    tokenizer: Any
    end: Sequence[int]
    longest: int
    seed: int
    progress: Progress

    def continued(self, tokens: torch.Tensor) -> torch.Tensor:
        """Sequences of which the source wrote all but the first quarter; shape (samples, length), int32."""
        length, parts = tokens.shape[1], list[torch.Tensor]()
        with self._seeded():
            for part in self.progress.track(torch.split(tokens, BATCH), "text of the source"):
                prompts = part[:, : max(1, length // GIVEN)].long()
                parts.append(self._written(prompts, min_length=length, max_length=length, pad_token_id=0))
        return torch.cat(parts)

    def answered(self, talks: Sequence[Sequence[Message]]) -> Iterator[list[Message]]:
        """Conversations whose last answer the source has written, one when it is asked for."""
        limits = {"max_new_tokens": self.longest, "eos_token_id": list(self.end), "pad_token_id": self.end[0]}
        with self._seeded():
            for talk in self.progress.track(talks, "answers of the source"):
                prompt = torch.tensor([templated(talk[:-1], self.tokenizer, ask=True)])
                answer = self._written(prompt, **limits)[0, prompt.shape[1] :]
                text = self.tokenizer.decode(answer, skip_special_tokens=True)
                yield [*talk[:-1], {"role": talk[-1]["role"], "content": text}]

    def _written(self, prompts: torch.Tensor, **limits: Any) -> torch.Tensor:
        """Prompts of one length and what follows them, sampled at temperature 1; int32, on the CPU."""
        prompts = prompts.to(self.model.device)
        chosen = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, **limits}
        written = self.model.generate(prompts, attention_mask=torch.ones_like(prompts), **chosen)
        return torch.as_tensor(written).cpu().int()

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        device = self.model.device
        with torch.random.fork_rng([] if device.type == "cpu" else [device]):
            torch.manual_seed(self.seed % 2**63)
            yield
