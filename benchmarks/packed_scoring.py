"""Log-likelihoods of continuations for lm-evaluation-harness, with every context computed once.

The harness runs context and continuation anew for each choice and keeps the logits of all positions.
Here all continuations of a context lie in one row behind it: each attends to the context and to itself,
and has the positions that it would have alone. Logits are computed where a token is predicted. The
results are those of the harness, up to rounding, where a model's attention window is not shorter than
the text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

Request = tuple[tuple[str, str], list[int], list[int]]


@dataclass(frozen=True)
class Row:
    """A context and its continuations, ready to be computed.

    Attributes:
        tokens: Those of the context, then those of each continuation but for its last.
        positions: The place of each in its own sequence.
        parts: 0 for the context, then the number of the continuation.
        requests: For each continuation the number of its request, its tokens, and from which places of
            the row they are predicted.
    """

    tokens: list[int]
    positions: list[int]
    parts: list[int]
    requests: list[tuple[int, list[int], list[int]]]


def pack(context: Sequence[int], continuations: Sequence[tuple[int, list[int]]], longest: int) -> Row:
    """Lays a context and its continuations out in a row.

    Args:
        context: Its tokens, at least one; the first go if there are too many for the model.
        continuations: The numbers and tokens of the requests with this context.
        longest: The model's limit for a sequence.
    """
    kept = list(context)[-(longest + 1 - max(len(tokens) for _, tokens in continuations)) :]
    tokens, positions, parts, requests = [*kept], [*range(len(kept))], [0] * len(kept), []
    for part, (number, continuation) in enumerate(continuations, 1):
        start, count = len(tokens), len(continuation) - 1
        requests.append((number, continuation, [len(kept) - 1, *range(start, start + count)]))
        tokens += continuation[:-1]
        positions += range(len(kept), len(kept) + count)
        parts += [part] * count
    return Row(tokens, positions, parts, requests)


def rows_of(requests: Sequence[Request], longest: int) -> list[Row]:
    """The rows of all requests, the longest first."""
    found: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
    for number, (_, context, continuation) in enumerate(requests):
        found.setdefault(tuple(context), []).append((number, continuation))
    rows = [pack(context, continuations, longest) for context, continuations in found.items()]
    return sorted(rows, key=lambda row: -len(row.tokens))


def batched(rows: Sequence[Row], tokens: int) -> Iterator[list[Row]]:
    """Sorted rows in batches of about so many tokens, padding counted."""
    at = 0
    while at < len(rows):
        count = max(1, tokens // len(rows[at].tokens))
        yield list(rows[at : at + count])
        at += count


def arranged(rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids and positions, shape (batch, length), and who attends to whom, (batch, 1, length, length)."""
    length = max(len(row.tokens) for row in rows)

    def padded(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (length - len(values))

    ids = torch.tensor([padded(row.tokens, 0) for row in rows])
    positions = torch.tensor([padded(row.positions, 0) for row in rows])
    parts = torch.tensor([padded(row.parts, -1) for row in rows])
    same = parts[:, :, None] == parts[:, None, :]
    context = (parts[:, None, :] == 0) & (parts[:, :, None] >= 0)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return ids, positions, ((same | context) & causal)[:, None]


class PackedModel(HFLM):  # type: ignore[misc]
    """A model for the harness that scores the continuations of a context together.

    Args:
        model: A causal language model of transformers, whose attention takes a mask as it is.
        tokenizer: Its tokenizer.
        batch_tokens: Tokens that are scored at once.
        batch_size: Texts that are generated at once.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_tokens: int, batch_size: int) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.batch_tokens = batch_tokens

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """For each request the log-likelihood of its continuation, and whether greedy decoding gives it."""
        result = [(0.0, False)] * len(requests)
        for rows in batched(rows_of(requests, self.max_length), self.batch_tokens):
            length = max(len(row.tokens) for row in rows)
            wanted = [
                (number, tokens, [at * length + place for place in places])
                for at, row in enumerate(rows)
                for number, tokens, places in row.requests
            ]
            logits = self._logits(rows, [place for _, _, places in wanted for place in places])
            parts = torch.split(logits, [len(tokens) for _, tokens, _ in wanted])
            for (number, tokens, _), part in zip(wanted, parts, strict=True):
                targets = torch.tensor(tokens, device=part.device)
                scores = part.float().log_softmax(-1).gather(1, targets[:, None])
                result[number] = scores.sum().item(), bool((part.argmax(-1) == targets).all())
        return result

    def _logits(self, rows: Sequence[Row], places: list[int]) -> torch.Tensor:
        """Logits at places of the flattened batch, shape (places, vocabulary)."""
        ids, positions, attends = (tensor.to(self.device) for tensor in arranged(rows))
        chosen = torch.tensor(places, device=self.device)

        def choose(head: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            return (inputs[0].flatten(0, 1)[chosen][None],)

        hook = self.model.get_output_embeddings().register_forward_pre_hook(choose)
        try:
            mask = torch.zeros(attends.shape, dtype=self.model.dtype, device=self.device)
            mask.masked_fill_(~attends, torch.finfo(mask.dtype).min)
            output = self.model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
            logits: torch.Tensor = output.logits[0]
            return logits
        finally:
            hook.remove()
