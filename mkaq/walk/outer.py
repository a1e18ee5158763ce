"""The model before its first layer and after its last one, run by its own code.

The model runs with recorders in place of its layers. The input of the first recorder is the input of layer 0
(embeddings, their scale, learned positions). The keyword arguments of each recorder (position embeddings, the
mask of its attention type) depend only on the sequence length.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from mkaq.arch.skeleton import build_skeleton
from mkaq.checkpoint.reader import Checkpoint
from mkaq.errors import CheckpointError
from mkaq.walk.hooks import input_of


class _Recorder(nn.Module):
    """Stands in for a layer and records its keyword arguments."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.arguments = arguments
        return hidden_states


class _Base(nn.Module):
    """Stands in for the model without its head and always returns the same hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_states = torch.empty(0)

    def forward(self, *_: object, **__: object) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=self.hidden_states)


class Outer:
    """A model of transformers without its decoder layers.

    Args:
        checkpoint: The source of the tensors, each loaded only while it is used.
        hf_config: The model's configuration; setting the attention implementation changes it.
        device: Where it runs.
        dtype: The dtype it computes in.

    Attributes:
        skeleton: The model; parameters that are not in use are on the meta device.
        layers: Its decoder layers, taken out.
    """

    def __init__(
        self, checkpoint: Checkpoint, hf_config: Any, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._checkpoint, self._device, self._dtype, self._arch = checkpoint, device, dtype, checkpoint.arch
        self.skeleton = build_skeleton(hf_config)
        self._base = self.skeleton.get_submodule(self._arch.base)
        self.layers: list[nn.Module] = list(self._base.get_submodule(self._arch.layers))
        for module in self.skeleton.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        self._put_layers([])

    def _put_layers(self, layers: list[nn.Module]) -> None:
        self._base.set_submodule(self._arch.layers, nn.ModuleList(layers))

    @contextmanager
    def embedding(self, used: torch.Tensor) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """For a `with` block, a function from token ids, shape (batch, length), to the input of layer 0.

        Args:
            used: The rows of the embedding to read; the function's ids are indices into `used`.
        """
        embedding = self._base.get_submodule(self._arch.embed)
        rows = self._checkpoint.read_rows(self._arch.embed_weight, used)
        embedding.weight = nn.Parameter(rows.to(self._device, self._dtype), requires_grad=False)
        embedding.padding_idx = None
        recorders = [_Recorder(layer) for layer in self.layers]

        def embed(ids: torch.Tensor) -> torch.Tensor:
            return input_of(recorders[0], partial(self._base, input_ids=ids, use_cache=False))

        try:
            with self._before_layers(recorders):
                yield embed
        finally:
            embedding.weight = nn.Parameter(embedding.weight.to("meta"), requires_grad=False)

    def arguments(self, length: int) -> list[dict[str, Any]]:
        """The keyword arguments of every layer for sequences of a length, for any batch size."""
        shape, name = (1, length, self._checkpoint.sizes.hidden), self._arch.final_norm
        recorders, norm = [_Recorder(layer) for layer in self.layers], self._base.get_submodule(name)
        embeds = torch.zeros(shape, device=self._device, dtype=self._dtype)
        self._base.set_submodule(name, nn.Identity())
        try:
            with self._before_layers(recorders):
                self._base(inputs_embeds=embeds, use_cache=False)
        finally:
            self._base.set_submodule(name, norm)
        return [recorder.arguments for recorder in recorders]

    @contextmanager
    def _before_layers(self, recorders: list[_Recorder]) -> Iterator[None]:
        """Puts recorders in place of the layers and loads the weights of all modules before them."""
        excluded = (self._arch.embed_weight, self._arch.final_norm_weight, self._arch.head_weight)
        prefixes = tuple(name.removesuffix("weight") for name in excluded)
        names = [name for name in self._checkpoint.outer_tensor_names if not name.startswith(prefixes)]
        self._put_layers([*recorders])
        try:
            self._load(names)
            yield
        finally:
            self._put_layers([])
            for name in names:
                self.skeleton.get_submodule(self._arch.in_module(name).rpartition(".")[0]).to("meta")

    @contextmanager
    def final_norm(self) -> Iterator[nn.Module]:
        """The norm after the last layer, for a `with` block."""
        norm = self._base.get_submodule(self._arch.final_norm)
        self._load(self._weight_and_bias(self._arch.final_norm_weight))
        try:
            yield norm
        finally:
            norm.to("meta")

    @contextmanager
    def head(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """For a `with` block, a function from the last layer's output to logits, through the final norm.

        The last layer's output has shape (batch, length, hidden_size).
        """
        with self.final_norm() as norm, self.unembedding() as logits:
            yield lambda hidden_states: logits(norm(hidden_states))

    @contextmanager
    def unembedding(
        self, dtype: torch.dtype | None = None
    ) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """For a `with` block, a function from the final norm's output to logits.

        Args:
            dtype: Type of the weight; None for that of the layers.
        """
        skeleton, stub = self.skeleton, _Base()
        head = skeleton.get_submodule(self._arch.head)

        def logits(normed: torch.Tensor) -> torch.Tensor:
            stub.hidden_states = normed
            output: torch.Tensor = skeleton(inputs_embeds=normed, use_cache=False).logits
            return output

        self._load(self._weight_and_bias(self._arch.head_weight), dtype)
        if self._arch.head_weight not in self._checkpoint.tensors:
            quantized = self._checkpoint.quantizes_head
            weight = self._checkpoint.quantized_head() if quantized else self._embedding()
            head.weight = nn.Parameter(weight.to(self._device, dtype or self._dtype), requires_grad=False)
        skeleton.set_submodule(self._arch.base, stub)
        try:
            yield logits
        finally:
            skeleton.set_submodule(self._arch.base, self._base)
            head.to("meta")

    def _embedding(self) -> torch.Tensor:
        return self._checkpoint.read([self._arch.embed_weight])[self._arch.embed_weight]

    def _dense_outer_names(self) -> list[str]:
        """The names of the tensors outside the layers that are not an output layer's codes."""
        dense = self._checkpoint.dense_shapes
        return [name for name in self._checkpoint.outer_tensor_names if name in dense]

    def _weight_and_bias(self, weight: str) -> list[str]:
        """The names of a weight and its bias, if they are stored."""
        names = (weight, weight.removesuffix("weight") + "bias")
        return [name for name in names if name in self._checkpoint.tensors]

    def _load(self, names: list[str], dtype: torch.dtype | None = None) -> None:
        placed = {
            self._arch.in_module(name): tensor.to(self._device, dtype or self._dtype)
            for name, tensor in self._checkpoint.each(names)
        }
        self.skeleton.load_state_dict(placed, strict=False, assign=True)
        for name in placed:
            self.skeleton.get_parameter(name).requires_grad_(False)

    def whole(self, layers: list[nn.Module]) -> Any:
        """The model with all its tensors and with layers that have their weights."""
        self._put_layers(layers)
        self._load(self._dense_outer_names())
        if self._checkpoint.quantizes_head:
            weight = self._checkpoint.quantized_head().to(self._device, self._dtype)
            self.skeleton.get_submodule(self._arch.head).weight = nn.Parameter(weight, requires_grad=False)
        self.skeleton.tie_weights()
        return self.skeleton.requires_grad_(False).to(self._device).eval()


def check_known(input_ids: torch.Tensor, checkpoint: Checkpoint) -> None:
    """Refuses tokens that the model has no embedding for.

    Raises:
        CheckpointError: If there is such a token.
    """
    vocabulary = checkpoint.tensors[checkpoint.arch.embed_weight].shape[0]
    if input_ids.numel() and int(input_ids.max()) >= vocabulary:
        what = f"the tokenizer gives token {int(input_ids.max())}, the model knows {vocabulary} tokens"
        raise CheckpointError(what, where=checkpoint.path)
