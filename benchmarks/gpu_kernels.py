"""GPTQ's inner loops side by side: the plain ones, and the fastest that a device has."""

import time
from typing import Any

import torch

from mkaq.quantize.gptq import PLAIN, GptqResult, Kernels, gptq
from mkaq.quantize.gptq_cpu import NUMBA
from mkaq.quantize.solved import kernels_for

WARM = 256  # columns of a first problem, on which kernels are compiled
FREE = {"desc_act": True, "static_groups": True}
OTHERS: dict[str, dict[str, Any]] = {  # what is not timed, but compared
    "asym": {"bits": 4, "sym": False},
    "3 bits, asym, desc_act, static_groups": {"bits": 3, "sym": False, **FREE},
    "8 bits, groups of 16": {"bits": 8, "group_size": 16},
    "groups of 256, desc_act": {"bits": 4, "group_size": 256, "desc_act": True},
    "2 bits, one group": {"bits": 2, "group_size": -1},
    "one group, asym, static_groups": {"bits": 4, "group_size": -1, "sym": False, **FREE},
}


def compare_kernels(device: torch.device, rows: int, columns: int, group_size: int) -> dict[str, Any]:
    """Solves one random weight with both.

    Args:
        device: Where.
        rows: Of the weight.
        columns: Of the weight, 256 or more.
        group_size: Of GPTQ; divides 256.

    Returns:
        `loops`: the seconds of each (`seconds`, and `first` of a small problem before), and the sum of the
        errors. `fastest`: the name of what the device has. How the results agree (`agreement`), and how
        those of `others` do: problems of at most 509 rows and 520 columns with other options.
    """
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator, device=device) / columns**0.5
    mix = torch.randn(columns, columns, generator=generator, device=device) / columns**0.5
    inputs = torch.randn(2 * columns, columns, generator=generator, device=device)
    inputs = inputs @ mix.add_(torch.eye(columns, device=device))
    hessian = inputs.T @ inputs
    del mix, inputs
    fastest = kernels_for(device)
    name = "plain" if fastest is PLAIN else "numba" if fastest is NUMBA else "triton"
    loops: dict[str, dict[str, float]] = {}
    results: list[GptqResult] = []

    def solve(kernels: Kernels, height: int, width: int, options: dict[str, Any]) -> tuple[float, GptqResult]:
        part = hessian[:width, :width].contiguous()
        wait(device)
        began = time.perf_counter()
        result = gptq(weight[:height, :width], part, **options, kernels=kernels)
        wait(device)
        return time.perf_counter() - began, result

    timed = {"bits": 4, "group_size": group_size}
    for told, kernels in (("plain", PLAIN), (name, fastest)):
        first, _ = solve(kernels, rows, WARM, timed)
        seconds, result = solve(kernels, rows, columns, timed)
        loops[told] = {"first": first, "seconds": seconds, "error": float(result.errors.double().sum())}
        results.append(result)
    found = {"rows": rows, "columns": columns, "group_size": group_size, "fastest": name, "loops": loops}
    others = {}
    for told, options in OTHERS.items():
        size = options.get("group_size", group_size)
        width = min(columns, 520 if size == -1 else 512)
        plain, own = (solve(k, min(rows, 509), width, timed | options)[1] for k in (PLAIN, fastest))
        others[told] = agreement(own, plain)
    return {**found, **agreement(results[-1], results[0]), "others": others}


def agreement(own: GptqResult, plain: GptqResult) -> dict[str, float]:
    """The shares of codes, scales and whole rows that are equal, and the errors over the plain ones."""
    same = own.codes == plain.codes
    return {
        "codes_equal": float(same.float().mean()),
        "rows_equal": float(same.all(1).float().mean()),
        "scales_equal": float((own.scales == plain.scales).float().mean()),
        "error_ratio": float(own.errors.double().sum() / plain.errors.double().sum()),
    }


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
