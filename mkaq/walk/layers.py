"""The decoder layers of a checkpoint as modules: read, the next one in advance, and given their weights."""

import copy
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import nn

from mkaq.checkpoint.reader import Checkpoint
from mkaq.errors import CheckpointError
from mkaq.formats.formats import format_of
from mkaq.formats.layer import split_linears
from mkaq.heap import return_freed_memory

Tensors = dict[str, torch.Tensor]


class Layers:
    """The layers of a skeleton, which have weights only while they are placed.

    Args:
        checkpoint: The source of the weights; quantized layers behave as in a runtime.
        modules: The layers, on the meta device.
        device: Where they run.
        dtype: The dtype they compute in.
    """

    def __init__(
        self, checkpoint: Checkpoint, modules: list[nn.Module], device: torch.device, dtype: torch.dtype
    ) -> None:
        self._checkpoint, self.modules, self._device, self._dtype = checkpoint, modules, device, dtype
        self._config = checkpoint.quantization
        self._format = format_of(self._config)
        names = checkpoint.arch.linear_names
        self._linears = [{name: module.get_submodule(name) for name in names} for module in modules]
        self._reader = ThreadPoolExecutor(1, "read-ahead")
        self._ahead: tuple[int, Future[Tensors]] | None = None

    @contextmanager
    def placed(self, index: int) -> Iterator[nn.Module]:
        """A layer with its weights, for a `with` block; meanwhile the next layer is read."""
        layer = self.place(index)
        if index + 1 < len(self.modules):
            self._ahead = index + 1, self._reader.submit(self._read, index + 1)
        try:
            yield layer
        finally:
            for name, linear in self._linears[index].items():
                layer.set_submodule(name, linear)
            for module in layer.modules():  # buffers stay: no checkpoint holds them
                for name, parameter in module.named_parameters(recurse=False):
                    empty = nn.Parameter(parameter.to("meta"), requires_grad=False)
                    module.register_parameter(name, empty)
            return_freed_memory()

    def place(self, index: int) -> nn.Module:
        """Gives a layer its weights permanently."""
        layer = self.modules[index]
        linears, rest = split_linears(self.tensors(index), self._linears[index])
        for name, like in self._linears[index].items():
            with self._unpacking(index, name):
                assert isinstance(like, nn.Linear)
                stored, config = linears.pop(name), self._config or {}
                module = self._format.restore(stored, like, config, self._device, self._dtype)
            layer.set_submodule(name, module)
        layer.load_state_dict(self._moved(rest), strict=False, assign=True)
        return layer.requires_grad_(False)

    def assemble(
        self, index: int, tensors: Mapping[str, torch.Tensor], *, partial: bool = False
    ) -> nn.Module:
        """A separate copy of layer `index` with the given weights.

        Args:
            index: The layer whose attention type and keyword arguments the copy has.
            tensors: Dense weights, by their names in the layer.
            partial: Whether some may be missing, and linear layers of another size; modules that need what
                is missing, or the usual size, cannot run.
        """
        layer = copy.deepcopy(self.modules[index])
        if partial:
            for name, tensor in self._moved(tensors).items():
                module, _, parameter = name.rpartition(".")
                layer.get_submodule(module).register_parameter(parameter, nn.Parameter(tensor, False))
        else:
            layer.load_state_dict(self._moved(tensors), strict=True, assign=True)
        return layer.requires_grad_(False)

    def tensors(self, index: int) -> Tensors:
        """The tensors of a layer by their names in it, as the format's `read` gives them."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == index:
            return ahead[1].result()
        return self._read(index)

    def _read(self, index: int) -> Tensors:
        linears, result = split_linears(self._checkpoint.read_layer(index), self._linears[index])
        for name, stored in linears.items():
            with self._unpacking(index, name):
                decoded = self._format.read(stored, self._config or {})
            result |= {f"{name}.{part}": tensor for part, tensor in decoded.items()}
        return result

    def _moved(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        return {name: tensor.to(self._device, self._dtype) for name, tensor in tensors.items()}

    @contextmanager
    def _unpacking(self, index: int, name: str) -> Iterator[None]:
        """Reports an error in unpacking a quantized tensor, which a matching shape does not rule out."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
            module = self._checkpoint.arch.in_layer(index, name)
            raise CheckpointError(
                f"{module} cannot be unpacked ({reason})", where=self._checkpoint.path
            ) from None
