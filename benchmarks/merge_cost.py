"""What `fuse: channels, order: measured` costs: in forward passes, and against depth.

usage: python -m benchmarks.merge_cost [--layers 8 16 32] [--hidden 256]

The built-in model and random Llamas of several depths are merged, each in a process of its own that
also times plain forward passes (walks) over the same calibration tokens before and after the merge.
Results go to benchmarks/results/merge_cost.json and .md.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import RESULTS, write_model
from benchmarks.stages import merged
from mkaq.calibrate.text import documents
from mkaq.calibrate.tokenizer import load_tokenizer
from mkaq.calibrate.tokens import calibration_tokens
from mkaq.checkpoint.resolve import resolve_model
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.digests import library_versions
from mkaq.heap import arrange_heap
from mkaq.walk.device import compute_dtype
from mkaq.walk.walk import LayerWalk

SAMPLES, LENGTH = 512, 128


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--worker", metavar="MODEL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        arrange_heap(sparing=False)  # as a run does
        print(json.dumps(measure(options.worker, options.ratio)))
        return
    rows = [row("builtin:tiny-llama", "built-in", options.ratio)]
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as scratch:
            write_model(Path(scratch, "model"), layers, options.hidden)
            rows.append(row(str(Path(scratch, "model")), "random", options.ratio))
    record = {"rows": rows, "hidden": options.hidden, "tokens": SAMPLES * LENGTH, "ratio": options.ratio}
    record |= {"libraries": library_versions(), "threads": torch.get_num_threads()}
    (RESULTS / "merge_cost.json").write_text(json.dumps(record, indent=2) + "\n")
    (RESULTS / "merge_cost.md").write_text(table(record))
    print(table(record))


def row(model: str, name: str, ratio: float) -> dict[str, Any]:
    """Measured in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.merge_cost", "--worker", model, "--ratio", str(ratio)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = {"model": name, **json.loads(done.stdout.splitlines()[-1])}
    print(found, flush=True)
    return found


def measure(model: str, ratio: float) -> dict[str, Any]:
    """Seconds of forward passes and of the merge, and peak memory in bytes."""
    source = open_checkpoint(resolve_model(model))
    texts = documents("builtin", None, "calibrate")
    tokens = calibration_tokens(texts, load_tokenizer(source.path), SAMPLES, LENGTH, 0)
    device = torch.device("cpu")
    walk = LayerWalk(source, device, compute_dtype(source.dtype, device))
    before = [forward_pass(walk, tokens) for _ in range(2)]
    settings = {"ratio": ratio, "order": "measured", "fuse": "channels"}
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        merged(source, tokens, settings, Path(folder, "merged"), device)
        seconds = time.perf_counter() - began
    passes = before + [forward_pass(walk, tokens) for _ in range(2)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "layers": source.num_layers,
        "forward_pass": statistics.median(passes),
        "merge": seconds,
        "passes": seconds / statistics.median(passes),
        "peak_bytes": peak,
    }


def forward_pass(walk: LayerWalk, tokens: torch.Tensor) -> float:
    began = time.perf_counter()
    for _ in walk.hidden_states(tokens):
        pass
    return time.perf_counter() - began


def table(record: dict[str, Any]) -> str:
    lines = [
        f"`python -m benchmarks.merge_cost`: {record['ratio']:.0%} of the layers merged, `fuse: channels`, "
        f"`order: measured`, {record['tokens']:,} calibration tokens, {record['threads']} threads; "
        f"random Llamas are {record['hidden']} wide.",
        "",
        "| model | layers | forward pass, s | merge, s | merge, passes | s per layer | peak GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in record["rows"]:
        cells = [r["model"], str(r["layers"]), f"{r['forward_pass']:.1f}", f"{r['merge']:.1f}"]
        cells += [f"{r['passes']:.1f}", f"{r['merge'] / r['layers']:.2f}", f"{r['peak_bytes'] / 1e9:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
