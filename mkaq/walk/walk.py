"""The walk: a forward pass with one decoder layer in memory at a time.

    embed -> [layer 0] -> h0 -> [layer 1] -> h1 -> ... -> [layer L-1] -> norm -> head

The model's own code does everything that depends on the family. A recording pass in which
every layer is a recorder gives the keyword arguments of each layer (position embeddings, the
mask of its own type); they are kept per sequence length and used with any batch.
"""

import copy
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mkaq.arch.families import FINAL_NORM
from mkaq.arch.skeleton import build_skeleton
from mkaq.checkpoint.finite import all_finite
from mkaq.checkpoint.reader import Checkpoint
from mkaq.errors import CheckpointError, UsageError
from mkaq.formats.config import gptq_format
from mkaq.formats.packing import unpack_linear
from mkaq.heap import return_freed_memory
from mkaq.quantize.bnb import dequantize_linear, restore_linear
from mkaq.ranks import ALONE, Ranks
from mkaq.walk.activations import Activations
from mkaq.walk.attention import attend_by_products

TOKENS_PER_BATCH = 4096


class _Recorder(nn.Module):
    """Stands for a layer: keeps the keyword arguments that it is called with."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.arguments = arguments
        return hidden_states


class LayerWalk:
    """A checkpoint ready to be walked.

    Args:
        checkpoint: Plain, GPTQ or bitsandbytes; quantized layers behave as in a runtime.
        device: Where layers run.
        dtype: The type that layers compute in.
        activations: Where hidden states are, on the device if None. Walks side by side share them, so that
            each lets go of what it has read of the other's.
        ranks: The processes among which the samples are shared.
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
        self.skeleton = build_skeleton(copy.deepcopy(checkpoint.hf_config))
        self._layers = list(self.skeleton.model.layers)
        names = checkpoint.family.linear_names
        self._linears: list[dict[str, Any]] = [
            {n: layer.get_submodule(n) for n in names} for layer in self._layers
        ]
        self.skeleton.model.layers = nn.ModuleList()
        self._arguments: dict[int, list[dict[str, Any]]] = {}
        self._reader = ThreadPoolExecutor(1, "read-ahead")
        self._ahead: tuple[int, Future[dict[str, torch.Tensor]]] | None = None
        self.skeleton.model.rotary_emb.to(device)

    @property
    def num_layers(self) -> int:
        """The number of decoder layers."""
        return len(self._layers)

    def use_fast_attention(self) -> None:
        """Attention that may differ from the model's own in the last bits, where that is faster."""
        if self.device.type == "cpu" and self.dtype == torch.bfloat16:
            attend_by_products(self.skeleton)
            self._arguments.clear()

    def use_eager_attention(self) -> None:
        """Attention as plain matrix products: on a CPU its backward pass is faster than sdpa's."""
        self.skeleton.set_attn_implementation("eager")
        self._arguments.clear()

    @torch.no_grad()
    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeds tokens.

        Args:
            input_ids: Integers, shape (samples, length), on any device.

        Returns:
            hidden_states, shape (samples, length, hidden_size), where `activations` keeps them.

        Raises:
            CheckpointError: If the model does not know a token.
        """
        known = self.checkpoint.tensors["model.embed_tokens.weight"].shape[0]
        if input_ids.numel() and int(input_ids.max()) >= known:
            what = f"the tokenizer gives token {int(input_ids.max())}, the model knows {known} tokens"
            raise CheckpointError(what, where=self.checkpoint.path)
        used, position = torch.unique(input_ids.long().cpu(), return_inverse=True)
        rows = self.checkpoint.read_rows("model.embed_tokens.weight", used)
        embedding = self.skeleton.model.embed_tokens
        embedding.weight = nn.Parameter(rows.to(self.device, self.dtype), requires_grad=False)
        if hasattr(embedding, "embed_scale"):
            embedding.embed_scale = embedding.embed_scale.to(self.device)
        embedding.padding_idx = None
        size = self.checkpoint.hf_config.hidden_size
        hidden_states = self.activations.empty((*input_ids.shape, size), self.dtype)
        for part in spans(hidden_states):
            hidden_states[part] = embedding(position[part].to(self.device))
            self.activations.release()
        embedding.weight = nn.Parameter(embedding.weight.to("meta"), requires_grad=False)
        return hidden_states

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """One decoder layer with its weights, for a `with` block; the next one is read meanwhile."""
        layer = self.place(index)
        if index + 1 < self.num_layers:
            self._ahead = index + 1, self._reader.submit(self._read_layer, index + 1)
        try:
            yield layer
        finally:
            for name, linear in self._linears[index].items():
                layer.set_submodule(name, linear)
            layer.to("meta")
            return_freed_memory()

    def place(self, index: int) -> nn.Module:
        """Gives a decoder layer its weights, for good."""
        layer: nn.Module = self._layers[index]
        config = self.checkpoint.quantization or {}
        tensors = self.layer_tensors(index)
        if config.get("quant_method") == "bitsandbytes":
            for name, linear in self._linears[index].items():
                own = {
                    k.removeprefix(f"{name}."): tensors.pop(k)
                    for k in list(tensors)
                    if k.startswith(f"{name}.")
                }
                if "bias" in own:
                    own["bias"] = own["bias"].to(self.dtype)
                with self._unpacking(f"model.layers.{index}.{name}"):
                    layer.set_submodule(name, restore_linear(own, linear, config, self.device))
        placed = {name: tensor.to(self.device, self.dtype) for name, tensor in tensors.items()}
        layer.load_state_dict(placed, strict=False, assign=True)
        layer.requires_grad_(False)
        return layer

    def assemble(self, index: int, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
        """A layer of its own, in the place of layer `index`, with weights that are given.

        Args:
            index: Whose attention type and keyword arguments it has.
            tensors: Dense, by their names below the layer.
        """
        layer: nn.Module = copy.deepcopy(self._layers[index])
        placed = {name: tensor.to(self.device, self.dtype) for name, tensor in tensors.items()}
        layer.load_state_dict(placed, assign=True)
        return layer.requires_grad_(False)

    def layer_tensors(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of a layer by their names below it; GPTQ weights are unpacked."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == index:
            return ahead[1].result()
        return self._read_layer(index)

    def _read_layer(self, index: int) -> dict[str, torch.Tensor]:
        prefix = f"model.layers.{index}."
        stored = self.checkpoint.read(self.checkpoint.layer_tensor_names(index))
        tensors = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
        with self._unpacking(prefix.rstrip(".")):
            return unpack_layer(tensors, self.checkpoint.quantization)

    @contextmanager
    def _unpacking(self, what: str) -> Iterator[None]:
        """Quantized tensors can lie in more ways than their shapes tell."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
            raise CheckpointError(
                f"{what} cannot be unpacked ({reason})", where=self.checkpoint.path
            ) from None

    def fetch(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states on the device, wherever they lie; themselves if they lie there."""
        return hidden_states.to(self.device)

    def run(self, layer: nn.Module, index: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """One layer on one batch, shape (batch, length, hidden_size), to the same shape, on the device."""
        arguments = self._layer_arguments(hidden_states.shape[1])[index]
        output: torch.Tensor = layer(self.fetch(hidden_states), **arguments)
        self.activations.release()
        return output

    def checked(self, output: torch.Tensor, index: int) -> torch.Tensor:
        """The output of layer `index`, if it is finite.

        Raises:
            CheckpointError: If it is not.
        """
        if not all_finite(output):
            raise CheckpointError(f"layer {index} gives NaN or infinity", where=self.checkpoint.path)
        return output

    @torch.no_grad()
    def run_all(self, layer: nn.Module, index: int, hidden_states: torch.Tensor) -> None:
        """One layer on all samples, batch by batch, in place.

        Raises:
            CheckpointError: If it gives NaN or infinity.
        """
        for batch in batches(hidden_states):
            batch.copy_(self.checked(self.run(layer, index, batch), index))

    def pass_layer(self, index: int, hidden_states: torch.Tensor) -> None:
        """Places one layer, runs it on all samples in place, and lets it go."""
        with self.layer(index) as layer:
            self.run_all(layer, index, hidden_states)

    def hidden_states(self, input_ids: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Walks all layers; yields each one's index and output.

        The output is one buffer, overwritten by the next step: copy what must stay.
        """
        hidden_states = self.embed(input_ids)
        for index in range(self.num_layers):
            self.pass_layer(index, hidden_states)
            yield index, hidden_states

    @contextmanager
    def final_norm(self) -> Iterator[nn.Module]:
        """The norm after the last layer, for a `with` block."""
        norm: nn.Module = self.skeleton.model.norm
        norm.weight = self._outer(FINAL_NORM)
        try:
            yield norm
        finally:
            norm.to("meta")

    @contextmanager
    def head(self) -> Iterator[nn.Module]:
        """The final norm and the output layer: call it with `inputs_embeds`, read `.logits`."""
        tied = "lm_head.weight" not in self.checkpoint.tensors
        with self.final_norm():
            self.skeleton.lm_head.weight = self._outer(
                "model.embed_tokens.weight" if tied else "lm_head.weight"
            )
            try:
                yield self.skeleton
            finally:
                self.skeleton.lm_head.to("meta")

    def _outer(self, name: str) -> nn.Parameter:
        tensor = self.checkpoint.read([name])[name].to(self.device, self.dtype)
        return nn.Parameter(tensor, requires_grad=False)

    @torch.no_grad()
    def _layer_arguments(self, length: int) -> list[dict[str, Any]]:
        longest = self.checkpoint.hf_config.max_position_embeddings
        if length > longest:
            raise UsageError(f"sequences of {length} tokens are longer than the model's {longest} positions")
        if length not in self._arguments:
            recorders = [_Recorder(layer) for layer in self._layers]
            self.skeleton.model.layers = nn.ModuleList(recorders)
            size = self.checkpoint.hf_config.hidden_size
            norm, self.skeleton.model.norm = self.skeleton.model.norm, nn.Identity()
            self.skeleton.model(
                inputs_embeds=torch.zeros(1, length, size, device=self.device, dtype=self.dtype),
                use_cache=False,
            )
            self.skeleton.model.norm = norm
            self.skeleton.model.layers = nn.ModuleList()
            self._arguments[length] = [recorder.arguments for recorder in recorders]
        return self._arguments[length]


def unpack_layer(tensors: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """Replaces `qweight`, `qzeros`, `scales`, `g_idx` of a GPTQ layer by the dense `weight` (float32)."""
    if not config or config["quant_method"] != "gptq":
        return tensors
    result = {
        k: v
        for k, v in tensors.items()
        if k.rpartition(".")[2] not in ("qweight", "qzeros", "scales", "g_idx")
    }
    for name in [k.removesuffix(".qweight") for k in tensors if k.endswith(".qweight")]:
        parts = {part: tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
        result[f"{name}.weight"] = unpack_linear(parts, config["bits"], gptq_format(config))
    return result


def dense_layer(tensors: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """The tensors of a layer with every quantized weight made dense, whatever the method."""
    if not config or config["quant_method"] != "bitsandbytes":
        return unpack_layer(tensors, config)
    result: dict[str, torch.Tensor] = {}
    modules = {
        k.removesuffix(".weight")
        for k, v in tensors.items()
        if k.endswith(".weight") and not v.is_floating_point()
    }
    for name, tensor in tensors.items():
        module = next((m for m in modules if name.startswith(f"{m}.")), None)
        if module is None or name == f"{module}.bias":
            result[name] = tensor
    for module in sorted(modules):
        own = {k.removeprefix(f"{module}."): v for k, v in tensors.items() if k.startswith(f"{module}.")}
        result[f"{module}.weight"] = dequantize_linear(own, config)
    return result


def batches(hidden_states: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of consecutive samples, about `TOKENS_PER_BATCH` tokens each."""
    yield from (hidden_states[rows] for rows in spans(hidden_states))


def spans(hidden_states: torch.Tensor) -> Iterator[slice]:
    """Which samples the batches of `batches` hold."""
    size, samples = batch_size(hidden_states), len(hidden_states)
    yield from (slice(start, min(start + size, samples)) for start in range(0, samples, size))


def batch_size(hidden_states: torch.Tensor) -> int:
    """Samples in a batch."""
    return max(1, TOKENS_PER_BATCH // hidden_states.shape[1])


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device that is there.

    Raises:
        UsageError: If it is not.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()) or (kind == "cpu" and number):
        raise UsageError(f"{name!r} is not auto, cpu, cuda or cuda:N", where="--device")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"no such device: {torch.cuda.device_count()} CUDA devices here", where=f"--device {name}"
        )
    return torch.device(name)


def compute_dtype(
    checkpoint: Checkpoint, device: torch.device, *, fast: bool = False, ranks: Ranks = ALONE
) -> torch.dtype:
    """The type that a walk computes in.

    Args:
        checkpoint: The model.
        device: Where layers run.
        fast: Speed counts for more than the last digits.
        ranks: The processes, all of which compute in it.

    Returns:
        On a GPU the checkpoint's own; on a CPU float32, or bfloat16 if that is the checkpoint's own and
        the CPU multiplies in it.
    """
    if device.type == "cpu" and not (
        fast and checkpoint.dtype == torch.bfloat16 and ranks.has_fast_bfloat16(device)
    ):
        return torch.float32
    return checkpoint.dtype
