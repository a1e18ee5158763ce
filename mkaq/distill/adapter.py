"""Low-rank adapters (LoRA, arXiv 2106.09685) on a layer's linear modules, by peft."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn


class Adapter(NamedTuple):
    """The change of a weight is alpha / r times a product of r columns and r rows."""

    r: int
    alpha: int
    seed: int


def attach(layer: nn.Module, adapter: Adapter, index: int) -> None:
    """Puts an adapter on every linear module of a layer, in place; only the adapters need gradients.

    Args:
        layer: The layer.
        adapter: The rank and the scale; the first factors are random, the second ones 0.
        index: The layer's number: each has other random numbers.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    config = LoraConfig(r=adapter.r, lora_alpha=adapter.alpha, target_modules=names, bias="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((adapter.seed + index) % 2**63)
        inject_adapter_in_model(config, layer)


def deltas(layer: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The change of each weight that the adapters of a layer stand for, by the weight's name, in float32."""
    from peft.tuners.lora import Linear

    for name, module in layer.named_modules():
        if isinstance(module, Linear):
            yield f"{name}.weight", module.get_delta_weight("default").detach().float()
