"""Quantize a model with GPTQModel on the CPU, in a process of its own.

Run it with the Python of an environment where GPTQModel is installed. GPTQModel logs to standard
output; the last line there is a JSON object that says what happened. GPTQModel keeps its own
defaults (dampening, column order and so on) where no option says otherwise, but for one: its
group-aware column order, which it refuses to combine with one group per row, is off with
``--group-size -1``.
"""

import argparse
import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def quantize(arguments: argparse.Namespace) -> dict[str, Any]:
    """Quantize and save the model; return what happened as plain JSON values."""
    # Read by GPTQModel when imported: its default, but never the 1 thread that makes it fail.
    threads = min(12, max(2, ((os.cpu_count() or 1) + 1) // 2))
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(threads))
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from safetensors.torch import load_file

    rows = load_file(arguments.calibration)["input_ids"].tolist()
    tokens = sum(len(row) for row in rows)
    config = QuantizeConfig(
        bits=arguments.bits,
        group_size=arguments.group_size,
        sym=not arguments.asym,
        desc_act=arguments.desc_act,
        damp_percent=arguments.damp_percent,
        offload_to_disk=not arguments.no_offload,
        **({"act_group_aware": False} if arguments.no_group_aware or arguments.group_size == -1 else {}),
    )
    dtype = "auto" if arguments.dtype == "auto" else getattr(torch, arguments.dtype)  # a name is not heeded
    started = time.perf_counter()
    model = GPTQModel.load(str(arguments.model_dir), config, device="cpu", dtype=dtype)
    loaded = time.perf_counter()
    model.quantize(  # Rows in the given order: nothing joined, sorted or, being of one length, padded.
        [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows],
        calibration_concat_size=None,
        calibration_sort=None,
        batch_size=arguments.batch_size,
    )
    quantized = time.perf_counter()
    log = {f"{entry['layer']}.{entry['module']}": entry for entry in model.quant_log}
    # GPTQModel drops rows of 10 tokens or fewer and cuts rows beyond the model's context length.
    partly = [name for name, entry in log.items() if int(entry["samples"]) != tokens]
    if not log or partly:
        raise RuntimeError(f"not all {tokens} calibration tokens reached: {partly or 'any module'}")
    model.save(str(arguments.out_dir))
    # A loss is a printed number; words in its place tell of rounding to nearest, without GPTQ.
    # A zero is a very small loss or, after a loss that was NaN, again the sign of rounding.
    losses = {name: entry["loss"] for name, entry in log.items()}
    words = [name for name, loss in losses.items() if not loss[0].isdigit()]
    zeros = [name for name, loss in losses.items() if name not in words and float(loss) == 0]
    return {
        "seconds": round(quantized - loaded, 3),
        "seconds_load": round(loaded - started, 3),
        "seconds_save": round(time.perf_counter() - quantized, 3),
        "modules": len(log),
        "calibration_tokens": tokens,
        "fallback_modules": words,
        "zero_loss_modules": zeros,
        "threads": torch.get_num_threads(),
        "damp_percent": sorted({float(entry["damp"]) for entry in log.values()}),
        "versions": {name: version(name) for name in ("gptqmodel", "torch", "transformers")},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Quantize a model with GPTQModel on the CPU.")
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("calibration", type=Path, help="safetensors file with rows of `input_ids`")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 8))
    parser.add_argument("--group-size", type=int, default=128, help="-1: one group per row")
    parser.add_argument("--asym", action="store_true", help="asymmetric: free zero points")
    parser.add_argument("--desc-act", action="store_true", help="columns by falling activation")
    parser.add_argument("--damp-percent", type=float, help="GPTQModel's own if absent")
    parser.add_argument("--no-group-aware", action="store_true", help="columns as they come within groups")
    parser.add_argument("--no-offload", action="store_true", help="keep finished layers in memory: faster")
    parser.add_argument("--batch-size", type=int, default=1, help="rows at a time")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    print(json.dumps(quantize(parser.parse_args())), flush=True)
