"""One layer's work under torch's profiler: how much of it is matrix products."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mkaq.calibrate.text import documents
from mkaq.calibrate.tokenizer import load_tokenizer
from mkaq.calibrate.tokens import calibration_tokens
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.fit.hold_out import hold_out
from mkaq.merge.channels import fuse
from mkaq.quantize.gptq import gptq
from mkaq.quantize.hessian import HessianSum
from mkaq.quantize.solved import kernels_for
from mkaq.recover.layerwise import tune
from mkaq.recover.steps import Tuning
from mkaq.walk.batches import spans
from mkaq.walk.device import compute_dtype
from mkaq.walk.piecewise import Piecewise
from mkaq.walk.walk import LayerWalk

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "linear", "matmul")
SOLVES = ("cholesky", "solve_triangular", "triangular_solve", "linalg_solve", "linalg_lu", "lu_solve")
ATTENTION = ("scaled_dot_product", "flash_attention", "efficient_attention", "cudnn_attention")
LAYER = 2


def product_shares(
    model: Path, device: torch.device, samples: int, length: int, group_size: int
) -> dict[str, dict[str, Any]]:
    """Profiles the work that one layer costs in the stages.

    Args:
        model: A checkpoint of at least four layers.
        device: Where it is done.
        samples: Of the calibration text.
        length: Tokens of each.
        group_size: Of GPTQ.

    Returns:
        For each kind of work the stages that do it (`as_in`), seconds in all, of operations on the
        device, and of those that are matrix products.
    """
    source = open_checkpoint(model)
    texts = documents("builtin", None, "calibrate")
    tokens = calibration_tokens(texts, load_tokenizer(model), samples, length, 0)
    walk = LayerWalk(source, device, compute_dtype(source.dtype, device))
    kept = hold_out(tokens)
    states = walk.embed(tokens)
    for index in range(LAYER):
        walk.pass_layer(index, states)
    found: dict[str, dict[str, Any]] = {}

    def add(name: str, as_in: str, work: Callable[[], object]) -> None:
        found[name] = {"as_in": as_in, **profiled(work, device)}

    arch = source.arch
    names = [[linear.name for linear in inputs] for inputs in arch.inputs]
    hessians: list[torch.Tensor] = []

    def sum_hessians() -> None:
        with torch.no_grad(), Piecewise(walk, layer, LAYER, states.clone()) as pieces:
            for group in names:
                total: HessianSum | None = None
                for rows in spans(states):
                    inputs = pieces.input_of(group[0], rows).flatten(0, -2)
                    total = total or HessianSum(inputs.shape[1], inputs.device)
                    total.add(inputs)
                assert total is not None
                hessians.append(total.whole())

    with walk.layer(LAYER) as layer:
        add("forward", "evaluate, merge", lambda: walk.run_all(layer, LAYER, states.clone()))
        add("hessians", "quantize", sum_hessians)
        weight = torch.cat([layer.get_submodule(name).weight.float() for name in names[0]])
        told = f"quantize, {' and '.join(name.rpartition('.')[2] for name in names[0])}"
        options: dict[str, Any] = {"bits": 4, "group_size": group_size, "kernels": kernels_for(device)}
        add("gptq", told, lambda: gptq(weight, hessians[0], **options))
    hessians.clear()
    pair = [LAYER, LAYER + 1]
    streams = states.clone(), states.clone()
    add("fuse", "merge by channels", lambda: fuse(walk, pair, *streams, kept, source.dtype))
    tuning = Tuning(steps=4, learning_rate="auto", batch_size=4, seed=0)
    targets = states.clone()
    walk.pass_layer(LAYER + 1, targets)
    with walk.layer(LAYER) as layer:
        work = lambda: tune(walk, layer, LAYER, states, targets, kept, tuning, source.dtype)  # noqa: E731
        add("tune", "recover, 4 steps", work)
    return found


def profiled(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds of some work, of its operations on the device, and of those that are matrix products.

    What an operation costs is what it does itself; on a GPU that is the time of the kernels that it starts.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        began = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    operations = products = 0.0
    for event in profiler.key_averages():
        if event.device_type != DeviceType.CPU:  # kernels: counted with the operations that start them
            continue
        spent = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        operations += spent
        products += spent if is_product(event.key) else 0.0
    return {"seconds": seconds, "operations": operations, "products": products}


def is_product(name: str) -> bool:
    """Whether an operation of torch is a matrix product, or made of such."""
    below = name.removeprefix("aten::").lstrip("_")
    return below in PRODUCTS or any(part in below for part in (*SOLVES, *ATTENTION))
