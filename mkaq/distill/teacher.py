"""What the source predicts on a text: written once, layer by layer, and read a batch at a time.

The source need not be there when the model learns: of each prediction the likeliest tokens are kept.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mkaq.distill.loss import LOGITS, Predictions, likeliest
from mkaq.progress import Progress
from mkaq.walk.walk import LayerWalk

FILE = 1 << 28  # bytes of a file, about
Head = Callable[[torch.Tensor], torch.Tensor]


@torch.no_grad()
def write_predictions(
    source: LayerWalk, tokens: torch.Tensor, k: int, folder: Path, progress: Progress
) -> None:
    """Writes what a model predicts after every token, in one walk.

    Args:
        source: A walk over the model; several processes share the samples, and the first one writes.
        tokens: Token ids, shape (samples, length).
        k: How many of the likeliest tokens are kept; at most the size of the vocabulary.
        folder: Where the files go.
        progress: Shows every layer.
    """
    files = torch.split(tokens, samples_per_file(tokens.shape[1], k))
    own = [file[source.ranks.slice_of(len(file))] for file in files]
    states = source.embed(torch.cat(own))
    for index in progress.track(range(source.num_layers), "predictions of the source"):
        source.pass_layer(index, states)
    with source.head() as head:
        parts = torch.split(states, [len(part) for part in own])
        for number, (file, part) in enumerate(zip(files, parts, strict=True)):
            predicted = predictions_of(source, head, part, k)
            whole = Predictions(*(source.ranks.gather(each, len(file)) for each in predicted))
            if source.ranks.is_main:
                save_file(whole._asdict(), folder / _name(number))


def predictions_of(walk: LayerWalk, head: Head, states: torch.Tensor, k: int) -> Predictions:
    """The predictions after last hidden states, on the CPU; the tensors have shape (samples, length, ...).

    Args:
        walk: The walk that made the states.
        head: Its `head`.
        states: Shape (samples, length, hidden_size).
        k: How many of the likeliest tokens are kept.
    """
    samples, length = states.shape[:2]
    flat = _empty(samples * length, k)
    told = Predictions(*(tensor.view(samples, length, *tensor.shape[1:]) for tensor in flat))
    size = max(1, LOGITS // walk.checkpoint.sizes.vocabulary)
    for row, state in enumerate(states):
        for start in range(0, length, size):
            found = likeliest(head(walk.to_device(state[start : start + size])[None])[0], k)
            for kept, part in zip(flat, found, strict=True):
                kept[row * length + start : row * length + start + len(part)] = part.cpu()
        walk.activations.release()
    return told


class Teacher:
    """The predictions that `write_predictions` wrote, in files.

    Args:
        folder: Where they are.
        length: Tokens per sample.
        k: The tokens that are kept of each prediction.
    """

    def __init__(self, folder: Path, length: int, k: int) -> None:
        self._folder, self._k, self._samples = folder, k, samples_per_file(length, k)

    def predictions(self, rows: Sequence[int]) -> Predictions:
        """Those of some samples, one after another: the tensors have shape (tokens, ...)."""
        parts = [_empty(0, self._k)]
        for row in rows:
            number, at = divmod(row, self._samples)
            with safe_open(self._folder / _name(number), "pt") as file:
                parts.append(Predictions(*(file.get_slice(name)[at] for name in Predictions._fields)))
        return Predictions(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def samples_per_file(length: int, k: int) -> int:
    """The samples whose predictions one file holds."""
    return max(1, FILE // (length * bytes_per_token(k)))


def bytes_per_token(k: int) -> int:
    """The bytes of one prediction."""
    return 6 * k + 2


def _empty(tokens: int, k: int) -> Predictions:
    """Predictions that are not there yet."""
    return Predictions(
        torch.empty(tokens, k, dtype=torch.int32),
        torch.empty(tokens, k, dtype=torch.float16),
        torch.empty(tokens, dtype=torch.float16),
    )


def _name(number: int) -> str:
    return f"predictions-{number:05}.safetensors"
