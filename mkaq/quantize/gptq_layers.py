"""GPTQ of a whole checkpoint: the solver inside the walk, layer by layer, true sequential."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from mkaq.checkpoint.finite import all_finite
from mkaq.checkpoint.output import Output, with_dtype
from mkaq.checkpoint.side_files import copy_side_files
from mkaq.checkpoint.writer import writer_of
from mkaq.errors import CheckpointError, UsageError
from mkaq.files import write_json
from mkaq.fit.final_norm import Rescaled, rescaled
from mkaq.formats.packing import pack_linear
from mkaq.quantize import gptq_cpu
from mkaq.quantize.gptq import PLAIN, DampingError, GptqResult, Kernels, gptq
from mkaq.quantize.hessian import HessianSum
from mkaq.quantize.joint import JointTarget
from mkaq.quantize.weight_error import ratio, relative_error
from mkaq.ranks import Ranks
from mkaq.walk.batches import spans
from mkaq.walk.piecewise import Piecewise
from mkaq.walk.walk import LayerWalk

HEAD_ROWS = 16_384  # tokens of the vocabulary whose rows are solved at once


@dataclass(frozen=True)
class GptqModule:
    """The record of a quantized linear layer.

    Attributes:
        name: The module's name in the model.
        error: ||X (W - Q)^T||^2 / ||X W^T||^2 over the calibration tokens.
        weight_error: ||W - Q||^2 / ||W||^2, W the weight that was rounded.
        damp_percent: The damping used.
        ridge: The ridge, if W was first solved toward the original model; else None.
        fallback: Always false: a failed factorization raises the damping or ends the run.
    """

    name: str
    error: float
    weight_error: float
    damp_percent: float
    ridge: float | None = None
    fallback: bool = False


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
        CheckpointError: If inputs or results of a linear layer are not finite.
    """
    source, dtype = walk.checkpoint, output.dtype
    modules: list[GptqModule] = []
    hidden_states = walk.embed(tokens)
    arch, norm = source.arch, source.arch.final_norm_weight
    with writer_of(walk.ranks, folder, output.shard_size) as writer:
        later = {norm, arch.head_weight} if config["lm_head"] else {norm}
        for name, tensor in source.each(n for n in source.outer_tensor_names if n not in later):
            writer.add(name, tensor.to(dtype))
        for index in output.progress.track(range(walk.num_layers), "quantize (gptq)"):
            prefix = f"{arch.layer_name(index)}."
            linears = {f"{prefix}{name}.weight" for name in arch.linear_names}
            for name, tensor in source.each(n for n in source.layer_tensor_names(index) if n not in linears):
                writer.add(name, tensor.to(dtype))
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
        writer.add(norm, rescaled(source, final_norm, dtype))
        if config["lm_head"]:
            packed, record = _quantized_head(walk, hidden_states, options)
            modules.append(record)
            for part, tensor in packed.items():
                writer.add(f"{arch.head}.{part}", tensor)
    write_json(folder / "config.json", {**with_dtype(source.config, dtype), "quantization_config": config})
    write_json(folder / "quantize_config.json", config)
    copy_side_files(source.path, folder)
    return Quantized(modules, final_norm, writer.digests)


@torch.no_grad()
def _quantized_head(
    walk: LayerWalk, hidden_states: torch.Tensor, options: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], GptqModule]:
    """The output layer, some tokens of the vocabulary at a time; `hidden_states` are the last layer's output.

    A factor of the final norm is a factor of the Hessian, which changes nothing here.
    """
    name, total = walk.checkpoint.arch.head, HessianSum(hidden_states.shape[-1], walk.device, walk.ranks)
    weight = walk.checkpoint.read([f"{name}.weight"])[f"{name}.weight"]
    with walk.final_norm() as norm:
        for rows in spans(hidden_states):
            total.add(norm(walk.to_device(hidden_states[rows])).flatten(0, -2))
        if not len(hidden_states):
            total.add(torch.empty(0, hidden_states.shape[-1], dtype=walk.dtype, device=walk.device))
    hessian, parts, sums = total.whole(), list[dict[str, torch.Tensor]](), torch.zeros(4, dtype=torch.float64)
    for piece in torch.split(weight, HEAD_ROWS):
        part = piece.to(walk.device).float()
        result = _checked(name, part, hessian, walk, options)
        missed = (part - result.weight).square(), part.square()
        costs = result.errors, result.energies, *(matrix.sum(1) for matrix in missed)
        sums += torch.tensor([float(cost.double().sum()) for cost in costs], dtype=torch.float64)
        codes = result.codes, result.scales, result.zeros, result.g_idx
        parts.append(pack_linear(*codes, options["bits"]))
    along = {"qweight": 1, "qzeros": 1, "scales": 1}
    packed = {key: torch.cat([part[key] for part in parts], dim) for key, dim in along.items()}
    error, energy, missed_sum, whole = sums.tolist()
    record = GptqModule(name, ratio(error, energy), ratio(missed_sum, whole), result.damp_percent)
    return packed | {"g_idx": parts[0]["g_idx"]}, record


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
    result = _checked(prefix + group[0], weight, hessian, walk, options)
    costs = result.errors.double(), result.energies.double()
    start = 0
    for name, linear in zip(group, linears, strict=True):
        rows = slice(start, start := start + linear.weight.shape[0])
        record = GptqModule(
            name=prefix + name,
            error=ratio(costs[0][rows].sum().item(), costs[1][rows].sum().item()),
            weight_error=relative_error(weight[rows], result.weight[rows]),
            damp_percent=result.damp_percent,
        )
        packed = pack_linear(
            result.codes[rows], result.scales[rows], result.zeros[rows], result.g_idx, options["bits"]
        )
        set_weight(layer, name, result.weight[rows].to(walk.dtype))
        yield name, packed, record


def _checked(
    name: str, weight: torch.Tensor, hessian: torch.Tensor, walk: LayerWalk, options: Mapping[str, Any]
) -> GptqResult:
    """The solution for a weight, or an error that names the layer."""
    if not bool(torch.isfinite(hessian).all()):
        raise CheckpointError(f"the inputs of {name} are not finite", where=walk.checkpoint.path)
    try:
        result = _solve(weight, hessian, walk.ranks, options)
    except DampingError as error:
        fix = "more or more varied calibration text"
        raise UsageError(f"the Hessian of {name} is {error}", fix=fix) from None
    if not all_finite(torch.stack([result.errors, result.energies])):
        what = f"the weights of {name} are so large that what they give overflows"
        raise CheckpointError(what, where=walk.checkpoint.path)
    return result


def _solve(
    weight: torch.Tensor, hessian: torch.Tensor, ranks: Ranks, options: Mapping[str, Any]
) -> GptqResult:
    """`gptq`; each process solves its share of the rows, all with the same damping."""
    rows, options = len(weight), dict(options)
    kernels = kernels_for(weight.device)
    fast = ranks.has_fast_bfloat16(weight.device)
    while True:
        part = gptq(weight[ranks.slice_of(rows)], hessian, **options, kernels=kernels, fast=fast)
        options["damp_percent"] = ranks.maximum(part.damp_percent)
        if not ranks.maximum(part.damp_percent < options["damp_percent"]):
            break
    return replace(
        part,
        codes=ranks.gather(part.codes, rows),
        scales=ranks.gather(part.scales, rows),
        zeros=ranks.gather(part.zeros, rows),
        weight=ranks.gather(part.weight, rows),
        errors=ranks.gather(part.errors, rows),
        energies=ranks.gather(part.energies, rows),
    )


def kernels_for(device: torch.device) -> Kernels:
    """The fastest inner loops of GPTQ that run on a device."""
    if device.type == "cpu":
        return gptq_cpu.NUMBA
    if device.type == "cuda" and torch.version.cuda is not None and find_spec("triton") is not None:
        from mkaq.quantize import gptq_cuda  # imports Triton, which only torch for CUDA installs

        return gptq_cuda.TRITON if gptq_cuda.works_on(device) else PLAIN
    return PLAIN


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
    total = HessianSum(features, walk.device, walk.ranks)
    for rows in spans(hidden_states):
        total.add(pieces.input_of(name, rows).flatten(0, -2))
    if not len(hidden_states):  # without samples too, a process must take part in the exchange of `add`
        total.add(torch.empty(0, features, dtype=walk.dtype, device=walk.device))
    return total.whole()
