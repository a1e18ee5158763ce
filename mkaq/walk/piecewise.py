"""Runs a decoder layer in pieces: outputs of its parts are kept, not computed again."""

from functools import partial
from types import TracebackType

import torch
from torch import nn

from mkaq.walk.batches import spans
from mkaq.walk.hooks import input_of
from mkaq.walk.walk import LayerWalk


class Piecewise:
    """One layer on all samples, for work on its linear layers in the order of the forward pass.

    The layer's two parts, attention and MLP, each begin at a norm and end in a linear layer, the writer. The
    norm's output and the writer's input are kept when they are requested. When a later module's input is
    requested, the part's outputs are computed from the writer's input with its current weights and replace
    the part, so every norm and every linear layer runs once. Leaving the `with` block restores the layer.

    Args:
        walk: The walk that the layer belongs to.
        layer: The layer, placed.
        index: Its number.
        hidden_states: Its input, shape (samples, length, hidden_size).
    """

    def __init__(
        self,
        walk: LayerWalk,
        layer: nn.Module,
        index: int,
        hidden_states: torch.Tensor,
    ) -> None:
        self._walk, self._layer, self._index, self._states = walk, layer, index, hidden_states
        arch = walk.checkpoint.arch
        self._parts, self._writers = (arch.attention, arch.mlp), arch.writers
        shared = arch.attention_norm == arch.mlp_norm
        self._norms = {} if shared else arch.norm_of  # norms that only one part reads
        self._originals: dict[str, nn.Module] = {}
        self._kept: dict[str, torch.Tensor] = {}

    def __enter__(self) -> "Piecewise":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, module in self._originals.items():
            self._replace(name, module)
        for values in self._kept.values():
            self._walk.activations.give_back(values)

    def input_of(self, name: str, rows: slice) -> torch.Tensor:
        """The input of a submodule for some samples, shape (rows, length, features).

        A submodule outside both parts is taken to lie between the attention and the end of the MLP.
        """
        part = self._part_of(name)
        self._end_parts(self._parts.index(part) if part else len(self._parts) - 1)
        norm = self._norms.get(part) if part else None
        if name in self._writers and norm in self._kept:
            self._replace(str(norm), _Replay(self._kept.pop(str(norm)), self._walk, alone=True))
        inputs = input_of(self._layer.get_submodule(name), partial(self._run, rows))
        self._keep(name if name in self._writers else norm, inputs, rows)
        return inputs

    def _part_of(self, name: str) -> str | None:
        return next((part for part in self._parts if name.startswith(f"{part}.")), None)

    def _keep(self, name: str | None, values: torch.Tensor, rows: slice) -> None:
        """Keeps the input of a writer or the output of a norm, unless the norm is already replaced."""
        if name is None or name in self._originals:
            return
        if name not in self._kept:
            shape = (len(self._states), *values.shape[1:])
            self._kept[name] = self._walk.activations.empty(shape, values.dtype)
        self._kept[name][rows] = values

    def finish(self) -> None:
        """Replaces the hidden states by the layer's output with its current weights.

        Raises:
            CheckpointError: If the output holds NaN or infinity.
        """
        self._end_parts(len(self._writers))
        for rows in spans(self._states):
            self._states[rows] = self._walk.checked(self._run(rows), self._index)

    def _run(self, rows: slice) -> torch.Tensor:
        for name in self._originals:
            if isinstance(module := self._layer.get_submodule(name), _Replay):
                module.rows = rows
        return self._walk.run(self._layer, self._index, self._states[rows])

    def _end_parts(self, count: int) -> None:
        """Replaces the first `count` parts by their outputs, if the inputs of their writers are kept."""
        for part, name in zip(self._parts[:count], self._writers, strict=False):
            if name not in self._kept:
                continue
            if norm := self._norms.get(part):
                self._replace(norm, nn.Identity())
            writer, inputs = self._layer.get_submodule(name), self._kept.pop(name)
            outputs = inputs
            if inputs.shape[-1] != self._states.shape[-1]:
                outputs = self._walk.activations.empty(tuple(self._states.shape), inputs.dtype)
            for rows in spans(self._states):
                outputs[rows] = writer(self._walk.fetch(inputs[rows]))
                self._walk.activations.release()
            if outputs is not inputs:
                self._walk.activations.give_back(inputs)
            self._replace(part, _Replay(outputs, self._walk, alone=part == self._parts[-1]))

    def _replace(self, name: str, module: nn.Module) -> None:
        replaced = self._layer.get_submodule(name)
        self._originals.setdefault(name, replaced)
        if isinstance(replaced, _Replay):
            self._walk.activations.give_back(replaced.outputs)
        self._layer.set_submodule(name, module)


class _Replay(nn.Module):
    """Stands in for a module and returns its kept outputs."""

    def __init__(self, outputs: torch.Tensor, walk: LayerWalk, alone: bool) -> None:
        super().__init__()
        self.outputs, self.rows, self._walk, self._alone = outputs, slice(0), walk, alone

    def forward(self, *_: object, **__: object) -> torch.Tensor | tuple[torch.Tensor, None]:
        outputs = self._walk.fetch(self.outputs[self.rows])
        return outputs if self._alone else (outputs, None)  # an attention also returns its weights, or None
