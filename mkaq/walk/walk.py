"""The walk: a forward pass with one decoder layer in memory at a time.

embed -> [layer 0] -> h0 -> [layer 1] -> h1 -> ... -> [layer L-1] -> norm -> head

Everything that depends on the model family is done by the model's own code.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from mkaq.checkpoint.finite import all_finite
from mkaq.checkpoint.reader import Checkpoint
from mkaq.errors import CheckpointError, UsageError
from mkaq.ranks import ALONE, Ranks
from mkaq.walk.activations import Activations
from mkaq.walk.attention import attend_by_products
from mkaq.walk.batches import batches, spans
from mkaq.walk.layers import Layers
from mkaq.walk.outer import Outer, check_known


class LayerWalk:
    """A checkpoint that can be walked.

    Args:
        checkpoint: A checkpoint of any format; quantized layers behave as in a runtime.
        device: Where layers run.
        dtype: The dtype they compute in.
        activations: Where hidden states lie; None for the device. Walks side by side share one object, so
            that each releases the other's states after reading them.
        ranks: The processes that share the samples.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        activations: Activations | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self.activations, self.ranks = activations or Activations(device), ranks
        self._outer = Outer(checkpoint, copy.deepcopy(checkpoint.hf_config), device, dtype)
        self._layers = Layers(checkpoint, self._outer.layers, device, dtype)
        self._arguments: dict[int, list[dict[str, Any]]] = {}

    @property
    def num_layers(self) -> int:
        """The number of decoder layers."""
        return len(self._layers.modules)

    def use_fast_attention(self) -> None:
        """Uses a faster attention where there is one; its last bits may differ from the model's own."""
        if self.device.type == "cpu" and self.dtype == torch.bfloat16:
            attend_by_products(self._outer.skeleton)
            self._arguments.clear()

    def use_eager_attention(self) -> None:
        """Uses attention as plain matrix products: on a CPU its backward pass is faster than sdpa's."""
        self._outer.skeleton.set_attn_implementation("eager")
        self._arguments.clear()

    @torch.no_grad()
    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The input of layer 0.

        Args:
            input_ids: Integers, shape (samples, length), on any device.

        Returns:
            hidden_states, shape (samples, length, hidden_size), where `activations` keeps them.

        Raises:
            CheckpointError: If the model does not know a token.
            UsageError: If the samples are longer than the model's positions.
        """
        check_known(input_ids, self.checkpoint)
        self._check_length(input_ids.shape[1])
        used, position = torch.unique(input_ids.long().cpu(), return_inverse=True)
        shape = (*input_ids.shape, self.checkpoint.sizes.hidden)
        hidden_states = self.activations.empty(shape, self.dtype)
        with self._outer.embedding(used) as embedding:
            for part in spans(hidden_states):
                hidden_states[part] = embedding(position[part].to(self.device))
                self.activations.release()
        return hidden_states

    def layer(self, index: int) -> AbstractContextManager[nn.Module]:
        """A decoder layer with its weights, for a `with` block; meanwhile the next layer is read."""
        return self._layers.placed(index)

    def assemble(
        self, index: int, tensors: Mapping[str, torch.Tensor], *, partial: bool = False
    ) -> nn.Module:
        """A separate copy of layer `index` with the given dense weights, by their names in the layer.

        With `partial` some may be missing, and linear layers of another size.
        """
        return self._layers.assemble(index, tensors, partial=partial)

    def layer_tensors(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of a layer by their names in it, as the format's `read` gives them."""
        return self._layers.tensors(index)

    def whole_model(self) -> Any:
        """The model of transformers with every weight in place; the walk cannot be used afterwards."""
        return self._outer.whole([self._layers.place(index) for index in range(self.num_layers)])

    def to_device(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states on the device; not copied if they are there."""
        return hidden_states.to(self.device)

    def autocast(self) -> torch.autocast:
        """For a `with` block: products in bfloat16, where it is fast in all processes."""
        fast = self.ranks.has_fast_bfloat16(self.device)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=fast)

    def run(self, layer: nn.Module, index: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """Runs one layer on one batch: from and to shape (batch, length, hidden_size), on the device."""
        arguments = self._layer_arguments(hidden_states.shape[1])[index]
        output: torch.Tensor = layer(self.to_device(hidden_states), **arguments)
        self.activations.release()
        return output

    def checked(self, output: torch.Tensor, index: int) -> torch.Tensor:
        """Returns the output of layer `index`, checked to be finite.

        Raises:
            CheckpointError: If it is not finite.
        """
        if not all_finite(output):
            fix = "if its weights are as they should be, compute in bfloat16 or float32"
            raise CheckpointError(f"layer {index} gives NaN or infinity", where=self.checkpoint.path, fix=fix)
        return output

    @torch.no_grad()
    def run_all(self, layer: nn.Module, index: int, hidden_states: torch.Tensor) -> None:
        """Runs one layer on all samples, batch by batch, in place.

        Raises:
            CheckpointError: If the output holds NaN or infinity.
        """
        for batch in batches(hidden_states):
            batch.copy_(self.checked(self.run(layer, index, batch), index))

    def pass_layer(self, index: int, hidden_states: torch.Tensor) -> None:
        """Places one layer, runs it on all samples in place, and frees its weights."""
        with self.layer(index) as layer:
            self.run_all(layer, index, hidden_states)

    def hidden_states(self, input_ids: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Walks all layers and yields the index and output of each.

        The output is one buffer, overwritten in the next step: copy what must stay.
        """
        hidden_states = self.embed(input_ids)
        for index in range(self.num_layers):
            self.pass_layer(index, hidden_states)
            yield index, hidden_states

    def final_norm(self) -> AbstractContextManager[nn.Module]:
        """The norm after the last layer, for a `with` block."""
        return self._outer.final_norm()

    def head(self) -> AbstractContextManager[Callable[[torch.Tensor], torch.Tensor]]:
        """For a `with` block, a function from the last layer's output to logits, through the final norm."""
        return self._outer.head()

    def unembedding(
        self, dtype: torch.dtype | None = None
    ) -> AbstractContextManager[Callable[[torch.Tensor], torch.Tensor]]:
        """For a `with` block, a function from the final norm's output to logits, its weight in a type."""
        return self._outer.unembedding(dtype)

    @torch.no_grad()
    def _layer_arguments(self, length: int) -> list[dict[str, Any]]:
        self._check_length(length)
        if length not in self._arguments:
            self._arguments[length] = self._outer.arguments(length)
        return self._arguments[length]

    def _check_length(self, length: int) -> None:
        longest = self.checkpoint.sizes.positions
        if length > longest:
            raise UsageError(f"sequences of {length} tokens are longer than the model's {longest} positions")
