"""A layer that learns: its trained weights in float32, and AdamW's two moments of each.

They stay on the device, in a layer that stays too; or they lie where hidden states lie (memory, then files),
and the layer is there only for a `with` block.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from mkaq.distill.adapter import Adapter, attach, deltas
from mkaq.heap import return_freed_memory
from mkaq.recover.steps import BETAS, share_gradients
from mkaq.walk.walk import LayerWalk


class Learner:
    """One layer of a model that learns.

    Args:
        walk: A walk over the model, in float32; its `activations` say where tensors lie.
        index: The layer.
        adapter: Train a low-rank change of its linear layers instead of its weights; None: all weights.
        resident: Whether the layer stays on the device.
    """

    def __init__(self, walk: LayerWalk, index: int, adapter: Adapter | None, *, resident: bool) -> None:
        self._walk, self._index, self._adapter = walk, index, adapter
        layer = self._built({})
        self._resident = layer if resident else None
        trained = _trained(layer)
        like = {name: parameter.data for name, parameter in trained.items()}
        first, second = (_room(walk, like, torch.float32, stay=resident) for _ in range(2))
        self._moments = {name: (first[name].zero_(), second[name].zero_()) for name in like}
        self._weights = like if resident else copied(walk, like)
        walk.activations.release()

    @contextmanager
    def placed(self) -> Iterator[nn.Module]:
        """The layer on the device, its trained weights ready for gradients, for a `with` block."""
        yield self._resident or self._built(self._weights)
        if self._resident is None:
            return_freed_memory()

    def step(self, layer: nn.Module, number: int, rate: float, tokens: int) -> None:
        """One step of AdamW without weight decay, along the gradients of all processes, clipped.

        Args:
            layer: The layer as `placed`, with its gradients, which are dropped.
            number: The number of the step, from 1.
            rate: The learning rate.
            tokens: The tokens of this process, over which its gradients are a mean.
        """
        trained = _trained(layer)
        share_gradients(list(trained.values()), tokens, self._walk.ranks)
        optimizer = torch.optim.AdamW(trained.values(), rate, BETAS, weight_decay=0.0, fused=True)
        for name, parameter in trained.items():
            first, second = (moment.to(parameter.device) for moment in self._moments[name])
            passed = torch.tensor(number - 1.0, device=parameter.device)
            optimizer.state[parameter] = {"step": passed, "exp_avg": first, "exp_avg_sq": second}
        optimizer.step()
        for name, parameter in trained.items():
            state = optimizer.state[parameter]
            now = parameter.data, state["exp_avg"], state["exp_avg_sq"]
            for kept, value in zip((self._weights[name], *self._moments[name]), now, strict=True):
                if kept.data_ptr() != value.data_ptr():
                    kept.copy_(value)
            parameter.grad = None
        self._walk.activations.release()

    def saved(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The layer's weights as they are saved in a type, on the CPU."""
        if self._adapter is None:
            return {name: tensor.to("cpu", dtype) for name, tensor in self._weights.items()}
        base = self._walk.layer_tensors(self._index)
        with self.placed() as layer:
            changed = {name: base[name].float() + delta.cpu() for name, delta in deltas(layer)}
        return {name: tensor.to("cpu", dtype) for name, tensor in {**base, **changed}.items()}

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and moments on the CPU, to go on from."""
        state = {f"weight.{name}": tensor.cpu() for name, tensor in self._weights.items()}
        for name, (first, second) in self._moments.items():
            state |= {f"exp_avg.{name}": first.cpu(), f"exp_avg_sq.{name}": second.cpu()}
        return state

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Goes on from a `state`."""
        for name, weight in self._weights.items():
            weight.copy_(state[f"weight.{name}"])
            for kind, moment in zip(("exp_avg", "exp_avg_sq"), self._moments[name], strict=True):
                moment.copy_(state[f"{kind}.{name}"])

    def _built(self, weights: Mapping[str, torch.Tensor]) -> nn.Module:
        whole = bool(weights) and self._adapter is None
        layer = self._walk.assemble(self._index, weights if whole else self._walk.layer_tensors(self._index))
        if self._adapter is None:
            return layer.requires_grad_(True)
        attach(layer, self._adapter, self._index)
        if weights:
            placed = {name: tensor.to(self._walk.device) for name, tensor in weights.items()}
            layer.load_state_dict(placed, strict=False, assign=True)
            for name in placed:
                layer.get_parameter(name).requires_grad_(True)
        return layer


def copied(walk: LayerWalk, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of a layer's tensors, which all have one type, where hidden states lie."""
    copies = _room(walk, tensors, next(iter(tensors.values())).dtype)
    for name, copy in copies.items():
        copy.copy_(tensors[name])
    walk.activations.release()
    return copies


def _room(
    walk: LayerWalk, like: Mapping[str, torch.Tensor], dtype: torch.dtype, *, stay: bool = False
) -> dict[str, torch.Tensor]:
    """Uninitialized tensors of the same shapes, parts of one: on the device, or where hidden states lie."""
    total = (sum(tensor.numel() for tensor in like.values()),)
    room = (
        torch.empty(total, dtype=dtype, device=walk.device) if stay else walk.activations.empty(total, dtype)
    )
    parts = torch.split(room, [tensor.numel() for tensor in like.values()])
    return {name: part.view(like[name].shape) for name, part in zip(like, parts, strict=True)}


def _trained(layer: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}
