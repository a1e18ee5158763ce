"""A decoder layer run in pieces: what its attention gave is not computed again for what follows it."""

from functools import partial
from types import TracebackType

import torch
from torch import nn

from mkaq.model.observe import input_of
from mkaq.model.walk import LayerWalk, spans

ATTENTION = "self_attn"


class Piecewise:
    """One layer on all samples, for work on its linear layers in the order in which it reaches them.

    The inputs of the linear layer that ends the attention are kept when they are asked for. When
    something after the attention is, its outputs are computed from them, with the weights of that
    moment, and the attention is not run any more. Leaving the `with` block gives the layer its
    attention back.

    Args:
        walk: That the layer belongs to.
        layer: Placed.
        index: Its number.
        hidden_states: Its input, shape (samples, length, hidden_size).
        writer: The name of the linear layer that ends the attention.
    """

    def __init__(
        self, walk: LayerWalk, layer: nn.Module, index: int, hidden_states: torch.Tensor, writer: str
    ) -> None:
        self._walk, self._layer, self._index, self._states = walk, layer, index, hidden_states
        self._writer, self._attention = writer, layer.get_submodule(ATTENTION)
        self._kept: torch.Tensor | None = None
        self._replay: _Replay | None = None

    def __enter__(self) -> "Piecewise":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._layer.set_submodule(ATTENTION, self._attention)

    def input_of(self, name: str, rows: slice) -> torch.Tensor:
        """What a submodule reads for some samples, shape (rows, length, features)."""
        if not name.startswith(f"{ATTENTION}."):
            self._end_attention()
        found = input_of(self._layer.get_submodule(name), partial(self._run, rows))
        if name == self._writer:
            if self._kept is None:
                shape = (len(self._states), *found.shape[1:])
                self._kept = self._walk.activations.empty(shape, found.dtype)
            self._kept[rows] = found
        return found

    def finish(self) -> None:
        """Replaces the hidden states by the layer's output, with the weights that it has now.

        Raises:
            CheckpointError: If it gives NaN or infinity.
        """
        self._end_attention()
        for rows in spans(self._states):
            self._states[rows] = self._walk.checked(self._run(rows), self._index)

    def _run(self, rows: slice) -> torch.Tensor:
        if self._replay is not None:
            self._replay.rows = rows
        return self._walk.run(self._layer, self._index, self._states[rows])

    def _end_attention(self) -> None:
        if self._kept is None or self._replay is not None:
            return
        writer = self._layer.get_submodule(self._writer)
        outputs = self._kept
        if outputs.shape[-1] != self._states.shape[-1]:
            outputs = self._walk.activations.empty(tuple(self._states.shape), outputs.dtype)
        with self._walk.products():
            for rows in spans(self._states):
                outputs[rows] = writer(self._kept[rows])
        self._kept, self._replay = outputs, _Replay(outputs)
        self._layer.set_submodule(ATTENTION, self._replay)


class _Replay(nn.Module):
    """Stands for an attention: gives what that one gave."""

    def __init__(self, outputs: torch.Tensor) -> None:
        super().__init__()
        self._outputs, self.rows = outputs, slice(0)

    def forward(self, *_: object, **__: object) -> tuple[torch.Tensor, None]:
        return self._outputs[self.rows], None
