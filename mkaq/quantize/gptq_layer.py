"""GPTQ of one layer: its linear layers in the order of the forward pass, true sequential."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from mkaq.formats.gptq import dequantize
from mkaq.formats.packing import pack_linear
from mkaq.quantize.hessian import hessian_of
from mkaq.quantize.joint import JointTarget
from mkaq.quantize.shortfall import clamped_scales, dead_columns
from mkaq.quantize.solved import GptqModule, solve
from mkaq.quantize.weight_error import ratio, relative_error
from mkaq.walk.batches import spans
from mkaq.walk.piecewise import Piecewise
from mkaq.walk.walk import LayerWalk

Packed = dict[str, torch.Tensor]
"""Codes, scales, zero points and groups of linear layers, by name below their layer."""


def solve_layer(
    walk: LayerWalk,
    layer: nn.Module,
    index: int,
    hidden_states: torch.Tensor,
    options: Mapping[str, Any],
    target: JointTarget | None,
) -> tuple[Packed, list[GptqModule]]:
    """Quantizes a layer in place, and replaces the hidden states by its output.

    Args:
        walk: The walk that the layer belongs to.
        layer: The layer, placed.
        index: Its number.
        hidden_states: Its input, shape (samples, length, hidden_size).
        options: The options of `gptq`.
        target: The original model, past the layers that this one replaces; None to round what is there.
    """
    arch, tensors, records = walk.checkpoint.arch, Packed(), list[GptqModule]()
    with Piecewise(walk, layer, index, hidden_states) as pieces:
        for inputs in arch.inputs:
            group = tuple(linear.name for linear in inputs)
            fitted = target and target.solve(pieces, layer, group[0])
            if fitted and fitted.ridge is not None:
                set_weight(layer, group[0], fitted.weight)
            hessian = _hessian(pieces, layer, group[0], hidden_states, walk)
            prefix = f"{arch.layer_name(index)}."
            for name, packed, record in _solve_group(layer, group, hessian, options, walk, prefix):
                records.append(replace(record, ridge=fitted.ridge) if fitted else record)
                tensors.update({f"{name}.{part}": tensor for part, tensor in packed.items()})
        pieces.finish()
    return tensors, records


def place(layer: nn.Module, packed: Packed, config: Mapping[str, Any]) -> None:
    """Gives a layer the weights that `solve_layer` has found."""
    linears: dict[str, Packed] = {}
    for full, tensor in packed.items():
        name, _, part = full.rpartition(".")
        linears.setdefault(name, {})[part] = tensor
    for name, parts in linears.items():
        set_weight(layer, name, dequantize(parts, config))


def _solve_group(
    layer: nn.Module,
    group: tuple[str, ...],
    hessian: torch.Tensor,
    options: Mapping[str, Any],
    walk: LayerWalk,
    prefix: str,
) -> Iterator[tuple[str, dict[str, torch.Tensor], GptqModule]]:
    """Solves the linear layers that share an input, and puts their quantized weights in place."""
    linears = [cast(nn.Linear, layer.get_submodule(name)) for name in group]
    weight = torch.cat([linear.weight.float() for linear in linears])
    result = solve(prefix + group[0], weight, hessian, walk, options)
    costs = result.errors.double(), result.energies.double()
    start = 0
    for name, linear in zip(group, linears, strict=True):
        rows = slice(start, start := start + linear.weight.shape[0])
        record = GptqModule(
            name=prefix + name,
            error=ratio(costs[0][rows].sum().item(), costs[1][rows].sum().item()),
            weight_error=relative_error(weight[rows], result.weight[rows]),
            damp_percent=result.damp_percent,
            dead_columns=dead_columns(weight[rows], hessian),
            clamped_scales=clamped_scales(weight[rows], result.scales[rows], result.g_idx),
        )
        packed = pack_linear(
            result.codes[rows], result.scales[rows], result.zeros[rows], result.g_idx, options["bits"]
        )
        set_weight(layer, name, result.weight[rows].to(walk.dtype))
        yield name, packed, record


def set_weight(layer: nn.Module, name: str, weight: torch.Tensor) -> None:
    """Gives a linear layer another weight."""
    linear = cast(nn.Linear, layer.get_submodule(name))
    linear.weight = nn.Parameter(weight.to(linear.weight.dtype), requires_grad=False)


@torch.no_grad()
def _hessian(
    pieces: Piecewise, layer: nn.Module, name: str, hidden_states: torch.Tensor, walk: LayerWalk
) -> torch.Tensor:
    """X^T X over the calibration tokens of all processes, X the inputs of a linear layer; float32."""
    features = cast(nn.Linear, layer.get_submodule(name)).in_features
    inputs = (pieces.input_of(name, rows) for rows in spans(hidden_states))
    return hessian_of(inputs, features, walk.device, walk.dtype, walk.ranks)
