"""The output layer, rounded against what the final norm gives it."""

from collections.abc import Mapping
from typing import Any

import torch

from mkaq.formats.packing import ROWS, pack_linear
from mkaq.quantize.hessian import hessian_of
from mkaq.quantize.shortfall import clamped_scales, dead_columns
from mkaq.quantize.solved import GptqModule, solve
from mkaq.quantize.weight_error import ratio
from mkaq.walk.batches import batches
from mkaq.walk.walk import LayerWalk


@torch.no_grad()
def quantize_head(
    walk: LayerWalk, hidden_states: torch.Tensor, options: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], GptqModule]:
    """The output layer, some tokens of the vocabulary at a time; `hidden_states` are the last layer's output.

    A factor of the final norm is a factor of the Hessian, which changes nothing here.
    """
    name, features = walk.checkpoint.arch.head, hidden_states.shape[-1]
    weight = walk.checkpoint.read([f"{name}.weight"])[f"{name}.weight"]
    with walk.final_norm() as norm:
        inputs = (norm(walk.to_device(states)) for states in batches(hidden_states))
        hessian = hessian_of(inputs, features, walk.device, walk.dtype, walk.ranks)
    parts, sums = list[dict[str, torch.Tensor]](), torch.zeros(4, dtype=torch.float64)
    clamped = 0
    for piece in torch.split(weight, ROWS):
        part = piece.to(walk.device).float()
        result = solve(name, part, hessian, walk, options)
        missed = (part - result.weight).square(), part.square()
        costs = result.errors, result.energies, *(matrix.sum(1) for matrix in missed)
        sums += torch.tensor([float(cost.double().sum()) for cost in costs], dtype=torch.float64)
        clamped += clamped_scales(part, result.scales, result.g_idx)
        codes = result.codes, result.scales, result.zeros, result.g_idx
        parts.append(pack_linear(*codes, options["bits"]))
    packed = {key: torch.cat([part[key] for part in parts], 1) for key in ("qweight", "qzeros", "scales")}
    error, energy, missed_sum, whole = sums.tolist()
    record = GptqModule(
        name=name,
        error=ratio(error, energy),
        weight_error=ratio(missed_sum, whole),
        damp_percent=result.damp_percent,
        dead_columns=dead_columns(weight, hessian),
        clamped_scales=clamped,
    )
    return packed | {"g_idx": parts[0]["g_idx"]}, record
