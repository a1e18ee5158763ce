"""The texts of benchmarks/quality.py: nothing in them is calibration text, and errors are over documents."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch

from mkaq.calibrate.text import documents
from mkaq.calibrate.tokens import calibration_tokens, evaluation_sequences
from mkaq.errors import UsageError
from mkaq.evaluate.perplexity import mean_per_token, summarize
from mkaq.walk.walk import LayerWalk

WINDOW, DOCUMENT = 32, 20_000


@dataclass(frozen=True)
class Text:
    """What is evaluated: sequences with the number of the document that each is from.

    Attributes:
        sequences: Document and tokens.
        left_out: Sequences that share tokens with the calibration text.
    """

    sequences: list[tuple[int, list[int]]]
    left_out: int


def text_of(path: str | None) -> tuple[str, str | None]:
    """Data set and path."""
    if not path:
        return "builtin", None
    return "jsonl" if path.endswith(".jsonl") else "text", path


def calibration_of(
    paths: Sequence[str], tokenizer: Any, num_samples: int, max_seq_length: int
) -> torch.Tensor:
    """Calibration tokens, as many from each file, in turn; shape (num_samples, max_seq_length)."""
    sources, rows = paths or [None], []
    for number, path in enumerate(sources):
        count = len(range(number, num_samples, len(sources)))
        texts = documents(*text_of(path), "calibrate")
        rows.append(iter(calibration_tokens(texts, tokenizer, count, max_seq_length, 0)))
    return torch.stack([next(rows[at % len(rows)]) for at in range(num_samples)])


def load_text(path: str | None, tokenizer: Any, seen: set[int], length: int, limit: int | None) -> Text:
    """The evaluation sequences of a text file, or of the builtin text: those of which nothing was seen.

    A file's documents are its pieces of `DOCUMENT` characters. What is too short for one sequence is
    left out.
    """
    found = documents(*text_of(path), "evaluate")
    if path:
        found = [text[at : at + DOCUMENT] for text in found for at in range(0, len(text), DOCUMENT)]
    sequences = []
    for number, text in enumerate(found):
        with suppress(UsageError):
            rows = evaluation_sequences([text], tokenizer, length)
            sequences += [(number, row) for row in rows if len(row) >= WINDOW]
    fresh = [(number, row) for number, row in sequences if windows([row]).isdisjoint(seen)]
    left_out = len(sequences) - len(fresh)
    if 10 * left_out >= len(sequences):
        raise UsageError(
            f"{left_out} of {len(sequences)} sequences share {WINDOW} tokens with the calibration text",
            where=path or "builtin",
        )
    count = min(limit or len(fresh), len(fresh))
    return Text([fresh[at * len(fresh) // count] for at in range(count)], left_out)


def windows(rows: Iterable[Sequence[int]]) -> set[int]:
    """A hash of every `WINDOW` tokens in a row."""
    return {hash(tuple(row[at : at + WINDOW])) for row in rows for at in range(len(row) - WINDOW + 1)}


@torch.no_grad()
def last_states(walk: LayerWalk, text: Text) -> torch.Tensor:
    """The last layer's output on a text, shape (sequences, longest sequence, hidden_size)."""
    rows = [row for _, row in text.sequences]
    length = max(map(len, rows))
    states = walk.embed(torch.tensor([row + row[-1:] * (length - len(row)) for row in rows]))
    for index in range(walk.num_layers):
        walk.pass_layer(index, states)
    return states


@torch.no_grad()
def measure(
    walk: LayerWalk, text: Text, source: tuple[LayerWalk, torch.Tensor] | None = None
) -> dict[str, Any]:
    """Token-weighted perplexity, and its standard error over documents.

    Args:
        walk: The model.
        text: What it reads.
        source: Another model and its `last_states` on this text. The logits of both are made side by
            side, a sequence at a time, and the divergence KL(source || model) per predicted token is
            measured too, in nats.
    """
    states = last_states(walk, text)
    losses, divergences, counts = dict[int, float](), dict[int, float](), dict[int, int]()
    with ExitStack() as stack:
        head = stack.enter_context(walk.head())
        source_head = stack.enter_context(source[0].head()) if source else None
        for at, (number, row) in enumerate(text.sequences):
            scores = head(states[at : at + 1, : len(row)])[0, :-1].float().log_softmax(-1)
            targets = torch.tensor(row[1:], device=scores.device)
            loss = torch.nn.functional.nll_loss(scores, targets, reduction="sum").item()
            losses[number] = losses.get(number, 0.0) + loss
            counts[number] = counts.get(number, 0) + len(targets)
            if source and source_head:
                wanted = source_head(source[1][at : at + 1, : len(row)])[0, :-1].float().log_softmax(-1)
                away = torch.nn.functional.kl_div(scores, wanted, reduction="sum", log_target=True).item()
                divergences[number] = divergences.get(number, 0.0) + away
    found = summarize(list(losses.values()), list(counts.values())).as_json()
    result = {**found, "documents": found.pop("sequences"), "sequences": len(text.sequences)}
    if source:
        mean, error = mean_per_token(list(divergences.values()), list(counts.values()))
        result |= {"kl": mean, "kl_error": error}
    return result
