"""A GPU that is not there: tensors that say they are on `cuda`, whose numbers lie on the CPU.

What a GPU refuses is refused here too: operations on tensors of both devices, `.numpy()` of one on the
GPU. So a test finds what was left on the wrong device, and results are real numbers. What it does not
see: what torch does within one call, kernels that a GPU has not, memory, and time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda", 0)
_CPU = torch.device("cpu")
_MOVES = {"to", "cpu", "cuda"}
_COPIES = {"copy_", "__get__", "__set__"}
_REFUSED = {"numpy", "__array__"}
_DEVICE: Any = torch.Tensor.device.__get__  # type: ignore[attr-defined]
_IS_CUDA: Any = torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]


class Elsewhere(torch.Tensor):
    """A tensor that is on the GPU."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Elsewhere":
        copied: Any = self.detach().clone().requires_grad_(self.requires_grad)
        copied._is_param = getattr(self, "_is_param", False)
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return compute(func, args, kwargs or {})


class _Mode(TorchFunctionMode):
    """Sees functions whose arguments are not on the GPU, too: they may make tensors there."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Does what a function does, on the CPU; the result is where a GPU would put it."""
    name = getattr(func, "__name__", "")
    if func == _DEVICE:
        return CUDA if isinstance(args[0], Elsewhere) else _plain(func, args, kwargs)
    if func == _IS_CUDA:
        return isinstance(args[0], Elsewhere)
    if name in _MOVES and args and isinstance(args[0], torch.Tensor):
        return _move(func, name, args, kwargs)
    given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    there = any(isinstance(tensor, Elsewhere) for tensor in given)
    if there and name in _REFUSED:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")
    if there and any(map(_is_here, given)):
        if name == "_has_compatible_shallow_copy_type":
            return False
        if not (name in _COPIES or _may_index(name, args)):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu")
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    device = kwargs.get("device")
    goes = there if device is None else torch.device(device).type == "cuda"
    if device is not None and goes:
        kwargs = kwargs | {"device": _CPU}
    return _wrapped(_plain(func, args, kwargs), goes)


def _move(func: Callable[..., Any], name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    tensor, *rest = args
    place = {"cpu": _CPU, "cuda": CUDA}.get(name)
    for value in (*rest, *kwargs.values()):
        if isinstance(value, (str, torch.device)):
            place = torch.device(value)
        elif isinstance(value, torch.Tensor):
            place = value.device
    goes = isinstance(tensor, Elsewhere) if place is None else place.type == "cuda"
    rest = [_CPU if _is_cuda(value) else value for value in rest]
    named = {key: _CPU if _is_cuda(value) else value for key, value in kwargs.items()}
    moved = _plain(func, (tensor, *rest), named) if name == "to" else tensor
    crossed = goes != isinstance(tensor, Elsewhere)
    with torch._C.DisableTorchFunctionSubclass():
        if crossed and moved.device.type != "meta" and moved.data_ptr() == tensor.data_ptr():
            moved = moved.clone()
        return moved.as_subclass(Elsewhere if goes else torch.Tensor)


def _may_index(name: str, args: Any) -> bool:
    """Whether values go where indices say: indices of what is on the GPU may lie on the CPU, slices copy."""
    if name not in ("__getitem__", "__setitem__"):
        return False
    indices = [value for value in tree_leaves(args[1]) if isinstance(value, torch.Tensor)]
    values = [args[0], *args[2:]]
    return not indices or not any(isinstance(value, torch.Tensor) and _is_here(value) for value in values)


def _is_cuda(value: object) -> bool:
    return isinstance(value, (str, torch.device)) and torch.device(value).type == "cuda"


def _is_here(tensor: torch.Tensor) -> bool:
    """Whether a tensor is not on the GPU; single numbers may be anywhere."""
    return not isinstance(tensor, Elsewhere) and _plain(torch.Tensor.dim, (tensor,), {}) > 0


def _plain(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _wrapped(found: Any, goes: bool) -> Any:
    """Tensors of a result as they should be; those that are so already stay the same objects."""
    if not goes:
        return found

    def wrap(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, Elsewhere) else tensor.as_subclass(Elsewhere)

    with torch._C.DisableTorchFunctionSubclass():
        return tree_map_only(torch.Tensor, wrap, found)


@contextmanager
def pretended_gpu(memory: int = 10**12) -> Iterator[torch.device]:
    """Gives a machine a GPU with some bytes of memory for a `with` block."""
    autocast, properties = torch.autocast, SimpleNamespace(name="pretended", total_memory=memory)
    with (
        patch("torch.version.cuda", None),  # no kernels but torch's own: there is nothing to run them on
        patch("torch.cuda.get_device_properties", lambda _: properties),
        patch("torch.cuda.mem_get_info", lambda _: (memory, memory)),
        patch("torch.cuda.max_memory_allocated", lambda _: 0),
        patch("torch.cuda.reset_peak_memory_stats", lambda _: None),
        patch("torch.cuda.synchronize", lambda _: None),
        patch("torch.autocast", lambda _, *args, **kwargs: autocast("cpu", *args, **kwargs)),
        _Mode(),
    ):
        yield CUDA
