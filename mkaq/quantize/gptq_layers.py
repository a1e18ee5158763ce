"""GPTQ of a whole checkpoint: the solver inside the walk, layer by layer, true sequential."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from mkaq.checkpoint.output import Output, with_dtype
from mkaq.checkpoint.output import cast as converted
from mkaq.checkpoint.side_files import copy_side_files
from mkaq.checkpoint.writer import writer_of
from mkaq.files import write_json
from mkaq.fit.final_norm import Rescaled, rescaled
from mkaq.formats.packing import pack_linear
from mkaq.quantize.head import quantize_head
from mkaq.quantize.hessian import hessian_of
from mkaq.quantize.joint import JointTarget
from mkaq.quantize.shortfall import clamped_scales, dead_columns
from mkaq.quantize.solved import GptqModule, solve
from mkaq.quantize.weight_error import ratio, relative_error
from mkaq.walk.batches import spans
from mkaq.walk.piecewise import Piecewise
from mkaq.walk.walk import LayerWalk


@dataclass(frozen=True)
class Quantized:
    """The record of a quantized checkpoint.

    Attributes:
        modules: Every quantized layer.
        final_norm: How the final norm was rescaled; None if it was not.
        digests: sha256 of the weight files by name.
    """

    modules: list[GptqModule]
    final_norm: Rescaled | None
    digests: Mapping[str, str]


def quantize_gptq(
    walk: LayerWalk,
    tokens: torch.Tensor,
    options: Mapping[str, Any],
    config: Mapping[str, Any],
    folder: Path,
    output: Output,
    target: JointTarget | None = None,
) -> Quantized:
    """Writes the quantized checkpoint and returns its record.

    Args:
        walk: The walk over the checkpoint to quantize.
        tokens: This process's calibration token ids, shape (samples, length).
        options: Options of `gptq`: bits, group_size, sym, desc_act, static_groups, damp_percent.
        config: The quantization_config of the quantized checkpoint.
        folder: Where the checkpoint goes.
        output: How it is written.
        target: The original model, toward which weights are solved before they are rounded.

    Raises:
        UsageError: If a Hessian cannot be factorized with any damping.
        UnsupportedError: If other weights overflow the dtype in which they are written.
        CheckpointError: If inputs or results of a linear layer are not finite.
    """
    source, dtype = walk.checkpoint, output.dtype
    modules: list[GptqModule] = []
    hidden_states = walk.embed(tokens)
    arch, norm = source.arch, source.arch.final_norm_weight
    with writer_of(walk.ranks, folder, output.shard_size) as writer:
        later = {norm, arch.head_weight} if config["lm_head"] else {norm}
        for name, tensor in source.each(n for n in source.outer_tensor_names if n not in later):
            writer.add(name, converted(tensor, dtype, name))
        for index in output.progress.track(range(walk.num_layers), "quantize (gptq)"):
            prefix = f"{arch.layer_name(index)}."
            linears = {f"{prefix}{name}.weight" for name in arch.linear_names}
            for name, tensor in source.each(n for n in source.layer_tensor_names(index) if n not in linears):
                writer.add(name, converted(tensor, dtype, name))
            if target is not None:
                target.enter(index, hidden_states)
            with walk.layer(index) as layer, Piecewise(walk, layer, index, hidden_states) as pieces:
                for inputs in arch.inputs:
                    group = tuple(linear.name for linear in inputs)
                    fitted = target and target.solve(pieces, layer, group[0])
                    if fitted and fitted.ridge is not None:
                        set_weight(layer, group[0], fitted.weight)
                    hessian = _hessian(pieces, layer, group[0], hidden_states, walk)
                    for name, packed, record in _solve_group(layer, group, hessian, options, walk, prefix):
                        modules.append(replace(record, ridge=fitted.ridge) if fitted else record)
                        for part, tensor in packed.items():
                            writer.add(f"{prefix}{name}.{part}", tensor)
                pieces.finish()
        final_norm = target.rescale(walk, hidden_states) if target else None
        writer.add(norm, converted(rescaled(source, final_norm, dtype), dtype, norm))
        if config["lm_head"]:
            packed, record = quantize_head(walk, hidden_states, options)
            modules.append(record)
            for part, tensor in packed.items():
                writer.add(f"{arch.head}.{part}", tensor)
    write_json(folder / "config.json", {**with_dtype(source.config, dtype), "quantization_config": config})
    write_json(folder / "quantize_config.json", config)
    copy_side_files(source.path, folder)
    return Quantized(modules, final_norm, writer.digests)


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
