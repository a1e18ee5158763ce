"""The inputs and outputs of submodules while a layer runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


class _Reached(Exception):
    """Raised by a hook once it has seen the input that it waits for."""


def input_of(module: nn.Module, call: Callable[[], object]) -> torch.Tensor:
    """The first input of a submodule during `call`, which ends there.

    Args:
        module: The submodule.
        call: Runs a module that contains it.

    Raises:
        RuntimeError: If the call does not reach the submodule.
    """
    seen: list[torch.Tensor] = []

    def see(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise _Reached

    handle = module.register_forward_pre_hook(see)
    try:
        call()
    except _Reached:
        return seen[0]
    finally:
        handle.remove()
    raise RuntimeError("the call does not reach the submodule")


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects every output of a submodule within a `with` block."""
    seen: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()
