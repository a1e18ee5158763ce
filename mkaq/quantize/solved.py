"""One weight solved by GPTQ: the rows shared among processes, the fastest loops, and errors that name it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch

from mkaq.checkpoint.finite import all_finite
from mkaq.errors import CheckpointError, UsageError
from mkaq.quantize import gptq_cpu
from mkaq.quantize.gptq import PLAIN, DampingError, GptqResult, Kernels, gptq
from mkaq.ranks import Ranks
from mkaq.walk.walk import LayerWalk


@dataclass(frozen=True)
class GptqModule:
    """The record of a quantized linear layer.

    Attributes:
        name: The module's name in the model.
        error: ||X (W - Q)^T||^2 / ||X W^T||^2 over the calibration tokens.
        weight_error: ||W - Q||^2 / ||W||^2, W the weight that was rounded.
        damp_percent: The damping used.
        ridge: The ridge, if W was first solved toward the original model; else None.
        dead_columns: Columns with weights that no token reached.
        clamped_scales: Scales at an end of float16, of groups with weights.
        fallback: Always false: a failed factorization raises the damping or ends the run.
    """

    name: str
    error: float
    weight_error: float
    damp_percent: float
    ridge: float | None = None
    dead_columns: int = 0
    clamped_scales: int = 0
    fallback: bool = False


def solve(
    name: str, weight: torch.Tensor, hessian: torch.Tensor, walk: LayerWalk, options: Mapping[str, Any]
) -> GptqResult:
    """The solution for a weight, or an error that names the layer."""
    if not bool(torch.isfinite(hessian).all()):
        raise CheckpointError(f"the inputs of {name} are not finite", where=walk.checkpoint.path)
    try:
        result = _shared(weight, hessian, walk.ranks, options)
    except DampingError as error:
        fix = "more or more varied calibration text"
        raise UsageError(f"the Hessian of {name} is {error}", fix=fix) from None
    if not all_finite(torch.stack([result.errors, result.energies])):
        what = f"the weights of {name} are so large that what they give overflows"
        raise CheckpointError(what, where=walk.checkpoint.path)
    return result


def _shared(
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
