"""How fast merging is: against the paper's published script, and writing against copying files.

usage: python -m benchmarks.merge_speed [--paper PIPELINE_PY [--paper-python PYTHON]] [--repeats 5]

Two comparisons; what is compared takes turns, each time in a process of its own, and medians are told.

- analysis and merge: `order: similarity, fuse: average`, and the script that the paper's authors
  published (pipeline.py of github.com/SempraETY/Pruning-via-Merging), on the same model, the same
  prompts and the same number of layers. The script is compared for speed only: it merges back to
  front, and what it saves are dropped layers. Skipped without a local copy of it.
- merge alone: a fixed plan applied to a random checkpoint of a real shape, published as a run does
  it (digests, synced to disk), against `cp` of what was written, `cp` and `sync`, nothing but the sha256
  of it, which a stage hands on, and averaging the state dict of the loaded model. What is read was just
  read, and free memory just used, by the process itself: the host of a virtual machine may take back what
  lies idle while a process starts, and who needs it first then waits (writing 3.85 GB took 0.7 s or 9 s,
  reading 5.6 GB 0.7 s or 1.9 s).

Results go to benchmarks/results/merge_speed.json and .md.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.machine import machine
from benchmarks.memory import RESULTS
from benchmarks.shapes import CONFIGS, write_checkpoint
from benchmarks.stages import merged
from mkaq.calibrate.text import documents
from mkaq.calibrate.tokenizer import load_tokenizer
from mkaq.calibrate.tokens import calibration_tokens
from mkaq.checkpoint.output import Output
from mkaq.checkpoint.resolve import resolve_model
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.digests import library_versions
from mkaq.heap import arrange_heap
from mkaq.merge.averaged import averaged_layers
from mkaq.merge.groups import MergePlan, layers_to_remove, plan_merge
from mkaq.merge.write import write_merged
from mkaq.peak import peak_bytes, reset_peak
from mkaq.progress import Progress
from mkaq.run.provenance import provenance_of
from mkaq.run.publish import publish
from mkaq.walk.device import pick_device

SHARD_SIZE = 4 * 10**9
FREE_BYTES = 8 * 10**9  # used just before each run
PAPER_RATIO = 0.4375  # 14 of the 32 layers of Llama-3-8B
NAMES = {
    "mkaq": "mkaq",
    "paper": "the paper's script",
    "cp": "cp",
    "cp and sync": "cp and sync",
    "sha256": "sha256 of what is written",
    "in memory": "loaded, averaged, saved (no sync)",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--paper", type=Path, help="the published pipeline.py")
    parser.add_argument("--paper-python", default=sys.executable, help="a Python that has its requirements")
    parser.add_argument("--model", default="builtin:tiny-llama", help="for the comparison with the paper")
    parser.add_argument("--prompts", type=int, default=57, help="as many as the script takes (52 or more)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--shape", choices=CONFIGS, default="llama3-8b", help="for the merge alone")
    parser.add_argument("--layers", type=int, default=8, help="of the checkpoint for the merge alone")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--worker", nargs=3, metavar=("WHAT", "MODEL", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        what, model, out = options.worker
        if what != "in memory":
            arrange_heap(sparing=False)  # as a run does
        print(json.dumps({"mkaq": apply, "in memory": apply_in_memory, "whole": whole}[what](model, out)))
        return
    record: dict[str, Any] = {
        "machine": machine(torch.get_num_threads()) | {"device": device_name()},
        "libraries": library_versions(),
    }
    record["apply"] = compare_apply(options.shape, options.layers, options.repeats)
    if options.paper:
        script = options.paper_python, options.paper.resolve()
        record["whole"] = compare_whole(
            script, options.model, options.prompts, options.length, options.repeats
        )
    results = RESULTS / "merge_speed.json"
    if not options.paper and results.is_file() and (earlier := json.loads(results.read_text()).get("whole")):
        record["whole"] = earlier
    RESULTS.mkdir(exist_ok=True)
    results.write_text(json.dumps(record, indent=2) + "\n")
    (RESULTS / "merge_speed.md").write_text(table(record))
    print(table(record))


def compare_whole(
    script: tuple[str, Path], model: str, prompts: int, length: int, repeats: int
) -> dict[str, Any]:
    """Analysis and merge: mkaq and the paper's script."""
    source = open_checkpoint(resolve_model(model))
    texts = documents("builtin", None, "calibrate")
    tokens = calibration_tokens(texts, load_tokenizer(source.path), prompts, length, 0)
    removed = round(PAPER_RATIO * source.num_layers)
    with tempfile.TemporaryDirectory() as scratch:
        file, out = Path(scratch, "tokens.safetensors"), Path(scratch, "out")
        save_file({"input_ids": tokens}, file)
        worker = Path(__file__).resolve().with_name("paper_worker.py")
        python, pipeline = script
        found = take_turns(
            {
                "mkaq": lambda: measured([*WORKER, "whole", str(source.path), str(out)]),
                "paper": lambda: measured(
                    [python, str(worker), str(pipeline), str(source.path), str(file), str(removed), str(out)]
                ),
            },
            out,
            repeats,
        )
    described = {"model": model, "layers": source.num_layers, "removed": removed}
    return {**described, "prompts": prompts, "length": length, "runs": found}


def compare_apply(shape: str, layers: int, repeats: int) -> dict[str, Any]:
    """The merge alone: mkaq, cp, and a state dict in memory."""
    with tempfile.TemporaryDirectory() as scratch:
        model, merged, out = (Path(scratch, name) for name in ("model", "merged", "out"))
        size = write_checkpoint(model, shape, layers)
        measured([*WORKER, "mkaq", str(model), str(merged)])
        written = sum(path.stat().st_size for path in merged.iterdir())
        found = take_turns(
            {
                "mkaq": lambda: measured([*WORKER, "mkaq", str(model), str(out)]),
                "cp": lambda: copied(merged, out, sync=False),
                "cp and sync": lambda: copied(merged, out, sync=True),
                "sha256": lambda: hashed(merged),
                "in memory": lambda: measured([*WORKER, "in memory", str(model), str(out)]),
            },
            out,
            repeats,
        )
    described = {"shape": shape, "layers": layers, "read_bytes": size, "written_bytes": written}
    return {**described, "plan": [dict(weights) for weights in fixed_plan(layers).layers], "runs": found}


def take_turns(
    jobs: dict[str, Callable[[], dict[str, Any]]], out: Path, repeats: int
) -> dict[str, list[dict[str, Any]]]:
    """Runs every job `repeats` times in turn; each finds `out` gone and the disk at rest."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            os.sync()
            runs[name].append(job())
            print(name, runs[name][-1], flush=True)
            if out.exists():
                shutil.rmtree(out)
    return runs


def prepare(folder: Path) -> None:
    """Reads what is to be read, and frees memory that was in use until now."""
    used = b"x" * FREE_BYTES
    for path in folder.iterdir():
        subprocess.run(["cat", str(path)], check=True, stdout=subprocess.DEVNULL)
    del used
    reset_peak()


def measured(command: list[str]) -> dict[str, Any]:
    """What a process of its own says on its last line."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def copied(source: Path, out: Path, *, sync: bool) -> dict[str, Any]:
    prepare(source)
    began = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    if sync:
        subprocess.run(["sync", *map(str, out.iterdir())], check=True)
    return {"seconds": time.perf_counter() - began}


def hashed(source: Path) -> dict[str, Any]:
    prepare(source)
    began = time.perf_counter()
    for path in source.iterdir():
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")
    return {"seconds": time.perf_counter() - began}


def fixed_plan(layers: int) -> MergePlan:
    """The paper's order, from the last pair on, so that its ratio of the layers becomes one."""
    removed = layers_to_remove(layers, PAPER_RATIO, None, (1, 1))
    return plan_merge(np.ones((layers, layers)), removed, "back_to_front", 0.6, (1, 1))


def apply(model: str, out: str) -> dict[str, Any]:
    """The plan applied and published."""
    source = open_checkpoint(Path(model))
    plan = fixed_plan(source.num_layers)

    def build(folder: Path) -> dict[str, str]:
        layers = averaged_layers(source, plan, source.dtype)
        output = Output(source.dtype, SHARD_SIZE, Progress(quiet=True))
        return write_merged(source, layers, plan.kept, folder, output).digests

    prepare(source.path)
    began = time.perf_counter()
    publish(Path(out), provenance_of("merge", None, {}), build)
    return taken(began)


def apply_in_memory(model: str, out: str) -> dict[str, Any]:
    """The plan applied to the state dict of the loaded model."""
    from transformers import AutoModelForCausalLM

    prepare(Path(model))
    began = time.perf_counter()
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    layers = loaded.model.layers
    plan = fixed_plan(len(layers))
    with torch.no_grad():
        for weights in plan.layers:
            if len(weights) > 1:
                states = [(layers[old].state_dict(), weight) for old, weight in weights.items()]
                for name, tensor in layers[min(weights)].state_dict().items():
                    tensor.copy_(torch.stack([state[name].float() * w for state, w in states]).sum(0))
    loaded.model.layers = torch.nn.ModuleList(layers[old] for old in plan.kept)
    loaded.config.num_hidden_layers = len(plan.kept)
    loaded.save_pretrained(out)
    return taken(began)


def whole(model: str, out: str) -> dict[str, Any]:
    """Analysis and merge, as a run does it, on the tokens that lie beside `out`."""
    tokens = load_file(Path(out).with_name("tokens.safetensors"))["input_ids"]
    began = time.perf_counter()
    source, device = open_checkpoint(Path(model)), pick_device("auto")
    settings = {"ratio": PAPER_RATIO, "order": "similarity", "fuse": "average"}

    def build(folder: Path) -> Mapping[str, str]:
        return merged(source, tokens, settings, folder, device).digests

    publish(Path(out), provenance_of("merge", settings, {}), build)
    return taken(began)


def taken(began: float) -> dict[str, Any]:
    return {"seconds": time.perf_counter() - began, "peak_bytes": peak_bytes()}


def device_name() -> str:
    device = pick_device("auto")
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def table(record: dict[str, Any]) -> str:
    here = record["machine"]
    lines = [
        f"`python -m benchmarks.merge_speed` on {here['cores']} cores ({here['processor']}), "
        f"{here['memory_bytes'] / 1e9:.0f} GB, device {here['device']}; medians (least to most)."
    ]
    if found := record.get("whole"):
        lines += [
            "",
            f"Analysis and merge of {found['model']}, {found['removed']} of {found['layers']} layers, "
            f"{found['prompts']} prompts of {found['length']} tokens:",
            "",
            *rows(found["runs"], None),
        ]
    found = record["apply"]
    lines += [
        "",
        f"Merge alone, {found['shape']} with {found['layers']} layers: {found['read_bytes'] / 1e9:.2f} GB "
        f"read, {found['written_bytes'] / 1e9:.2f} GB written, the page cache warm:",
        "",
        *rows(found["runs"], found["written_bytes"]),
    ]
    return "\n".join(lines) + "\n"


def rows(runs: dict[str, list[dict[str, Any]]], written: int | None) -> list[str]:
    """A row for each thing that was compared: seconds, GB/s written if known, times mkaq's, memory."""
    middle = {name: statistics.median(run["seconds"] for run in of) for name, of in runs.items()}
    lines = ["| | seconds | GB/s | of mkaq's time | peak GB |", "|---|---|---|---|---|"]
    for name, of in runs.items():
        seconds = sorted(run["seconds"] for run in of)
        peaks = [run["peak_bytes"] for run in of if "peak_bytes" in run]
        cells = [NAMES[name], f"{middle[name]:.1f} ({seconds[0]:.1f} to {seconds[-1]:.1f})"]
        cells += [
            f"{written / middle[name] / 1e9:.2f}" if written else "",
            f"{middle[name] / middle['mkaq']:.2f}",
        ]
        cells += [f"{max(peaks) / 1e9:.2f}" if peaks else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


WORKER = [sys.executable, "-m", "benchmarks.merge_speed", "--worker"]

if __name__ == "__main__":
    main()
