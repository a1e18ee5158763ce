"""Which runtimes load what mkaq writes, and whether they compute what it means.

usage: python -m benchmarks.runtimes --transformers PYTHON --compressed PYTHON --vllm PYTHON --onnx PYTHON
                                     --mlx PYTHON --llamacpp PYTHON [--artifacts FOLDER | --artifact FOLDER]

The built-in model in every format, or one artifact in the formats that it has (`--artifact`).

Each PYTHON is that of an environment with the runtime and without mkaq; a runtime without one is left out
(the rows that an earlier run has stay).
`--exact` asks transformers and vLLM in the most exact type that they take, and gives llama.cpp the decoded
weights in float16, since it rounds to 8 bits what it multiplies with quantized ones: what is left of a
difference is then the artifact's, not the runtime's.

`make runtimes` makes them.

For 48 tokens of text a runtime gives the log-probability of each; mkaq's own, from the decoded weights in
float32, are beside them. A runtime agrees if the mean difference is below 0.05, or below twice what bfloat16
makes of the same weights; wrong weights make more than 1. It also continues three prompts by 32 likeliest
tokens; where it first takes another one than mkaq, the gap is what lies between the logits of the two.
Results go to benchmarks/results/runtimes.json and .md, those of an artifact to runtimes_NAME.json and .md.
"""

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
import yaml
from safetensors.torch import save_file

from benchmarks.machine import machine
from benchmarks.runtime_job import MARK, NEW
from benchmarks.runtimes_report import report
from mkaq import pipeline
from mkaq.calibrate.text import documents
from mkaq.calibrate.tokenizer import load_tokenizer
from mkaq.calibrate.tokens import evaluation_sequences
from mkaq.checkpoint.end_tokens import end_tokens
from mkaq.checkpoint.output import with_dtype
from mkaq.checkpoint.resolve import resolve_model
from mkaq.checkpoint.side_files import copy_side_files
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.export.formats import EXPORTS
from mkaq.export.settings import Settings
from mkaq.generate.stream import stream
from mkaq.manifest import read_manifest
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
GPTQ += [
    {"bits": bits, "sym": sym, "group_size": 128, "lm_head": True}
    for bits, sym in ((4, True), (8, True), (3, True), (4, False))
]
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time there was an old man who lived by the sea, and every morning he",
)


class Worker(NamedTuple):
    """How a runtime is asked.

    Attributes:
        runtime: Its name.
        script: What runs in its environment.
        formats: Those that it is given.
        exact: The most exact type that it computes in, if that can be chosen.
    """

    runtime: str
    script: str
    formats: tuple[str, ...]
    exact: str | None = None


WORKERS = {  # by option
    "compressed": Worker(
        "transformers with compressed-tensors", "runtime_transformers.py", ("compressed-tensors",), "float32"
    ),
    "mlx": Worker("MLX on a CPU", "runtime_mlx.py", ("dense", "gptq", "mlx")),
    "llamacpp": Worker("llama.cpp", "runtime_llamacpp.py", ("gguf",), "float16"),
    "vllm": Worker("vLLM on a CPU", "runtime_vllm.py", ("dense", "gptq", "compressed-tensors"), "float16"),
    "onnx": Worker("ONNX Runtime GenAI", "runtime_onnx.py", ("dense", "gptq")),
    "transformers": Worker(
        "transformers with GPTQModel", "runtime_transformers.py", ("dense", "gptq"), "float32"
    ),
}
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option in WORKERS:
        parser.add_argument(f"--{option}", metavar="PYTHON", help=f"for {WORKERS[option].runtime}")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--artifacts", type=Path, help="made there, or found; a temporary folder if absent")
    where.add_argument("--artifact", type=Path, help="one artifact, instead of the built-in model's")
    what = "ask those alone that can compute in a more exact type than the artifact's, in that type"
    parser.add_argument("--exact", action="store_true", help=what)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        one: Path | None = options.artifact
        made = forms_of(one) if one else artifacts(options.artifacts or Path(scratch))
        ids, prompts = inputs(one or resolve_model("builtin:tiny-llama"))
        name = read_manifest(one).name if one else None
        dense = {settings_key(case): case["path"] for case in made if case["format"] in ("dense", "gptq")}
        rows: list[Row] = []
        for option, worker in WORKERS.items():
            python = getattr(options, option)
            if not python or (options.exact and not worker.exact):
                continue
            cases = {str(case["path"]): case for case in made if case["format"] in worker.formats}
            dtype = {"dtype": worker.exact} if options.exact else {}
            if dtype and option == "llamacpp":
                cases = {str(decoded(dense[settings_key(c)], Path(scratch))): c for c in cases.values()}
            for folder, answer in answers(python, worker.script, list(cases), ids, prompts, **dtype):
                case = cases[folder]
                truth = truth_of(dense[settings_key(case)], ids, prompts)
                rows.append(row_of(case | dtype, worker.runtime, answer, truth))
                write_results(rows, name)  # what is there survives an interruption


def artifacts(folder: Path) -> list[Row]:
    """Makes every artifact, and its exports, below a folder; what is there already is kept."""
    made: list[Row] = []
    for settings in [None, *GPTQ]:
        name = "dense" if settings is None else "-".join(f"{key}_{value}" for key, value in settings.items())
        path, shape = folder / name, settings or {}
        if not path.exists():
            model = untied(folder / "untied") if shape.get("lm_head") else "builtin:tiny-llama"
            make(settings, str(model), folder / "run")
            shutil.copytree(folder / "run" / "artifact", path)
        made.append({"format": "dense" if settings is None else "gptq", **shape, "path": path})
        model = open_checkpoint(path, quantized=True)
        for kind, export in EXPORTS.items():
            out = folder / f"{name}.{kind}"
            if not export.refusal(model, model.quantization) and not out.exists():
                out.mkdir()
                export.write(model, out, Settings(name))
            if out.exists():
                made.append({"format": kind, **shape, "path": out})
    return made


def forms_of(artifact: Path) -> list[Row]:
    """The formats of one artifact."""
    config = open_checkpoint(artifact, quantized=True).quantization
    shape = {key: config[key] for key in ("bits", "sym", "group_size")} if config else {}
    first = {"format": "gptq" if config else "dense", **shape, "path": artifact}
    others = [kind for kind in EXPORTS if (artifact / kind).is_dir()]
    return [first, *({"format": kind, **shape, "path": artifact / kind} for kind in others)]


def decoded(artifact: Path, folder: Path) -> Path:
    """Writes an artifact's weights, decoded, as GGUF in float16 below a folder; returns where."""
    coded, model = open_checkpoint(artifact, quantized=True), folder / "decoded"
    whole_model(coded, CPU, torch.float16).save_pretrained(model)
    config = {key: value for key, value in coded.config.items() if key != "quantization_config"}
    (model / "config.json").write_text(json.dumps(with_dtype(config, torch.float16)))
    copy_side_files(artifact, model)
    (out := folder / f"{artifact.name}.float16").mkdir()
    EXPORTS["gguf"].write(open_checkpoint(model), out, Settings("decoded"))
    shutil.rmtree(model)
    return out


def untied(folder: Path) -> Path:
    """The built-in model with an output layer of its own, equal to the embedding but for one row."""
    if not folder.exists():
        source = open_checkpoint(resolve_model("builtin:tiny-llama"))
        shutil.copytree(source.path, folder)
        tensors = source.read(source.tensors)
        head = tensors[source.arch.embed_weight].clone()
        head[5] *= 1.01
        save_file({**tensors, source.arch.head_weight: head}, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps({**source.config, "tie_word_embeddings": False}))
    return folder


def make(settings: Row | None, model: str, folder: Path) -> None:
    """Runs a recipe on a model."""
    recipe: Row = {
        "version": 1,
        "name": "runtimes",
        "model": {"path": model},
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


def inputs(model: Path) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The tokens of a text, and of the prompts."""
    tokenizer = load_tokenizer(model)
    sequences = evaluation_sequences(documents("builtin", None, "evaluate"), tokenizer, TOKENS)
    return tuple(sequences[0]), tuple(tuple(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS)


def settings_key(case: Row) -> str:
    return json.dumps({key: value for key, value in case.items() if key not in ("format", "path")})


class Truth(NamedTuple):
    """What the decoded weights say in float32.

    Attributes:
        scores: The log-probability of each token of the text after the first.
        texts: The continuation of each prompt.
        logits: Those from which each of its tokens was taken.
        noise: The mean difference of the scores that bfloat16 makes.
    """

    scores: list[float]
    texts: list[list[int]]
    logits: list[list[torch.Tensor]]
    noise: float


@cache
@torch.no_grad()
def truth_of(path: Path, ids: tuple[int, ...], prompts: tuple[tuple[int, ...], ...]) -> Truth:
    checkpoint, tokens = open_checkpoint(path, quantized=True), torch.tensor([ids])
    shorter = scores_of(whole_model(checkpoint, CPU, torch.bfloat16), tokens)
    model = whole_model(checkpoint, CPU, torch.float32)
    scores = scores_of(model, tokens)
    truth = Truth(scores.tolist(), [], [], (shorter - scores).abs().mean().item())
    ends = end_tokens(path, load_tokenizer(path))
    for prompt in prompts:
        seen: list[torch.Tensor] = []

        def choose(last: torch.Tensor, seen: list[torch.Tensor] = seen) -> int:
            seen.append(last)
            return int(last.argmax())

        truth.texts.append(list(stream(model, torch.tensor([prompt]), NEW, ends, choose)))
        truth.logits.append(seen)
    return truth


def scores_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The log-probability of each token after the first."""
    logits = model(tokens, use_cache=False).logits.float()
    return logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None]).squeeze(1)


def answers(
    python: str,
    script: str,
    folders: list[str],
    ids: Sequence[int],
    prompts: Sequence[Sequence[int]],
    dtype: str = "auto",
) -> Iterator[tuple[str, Row]]:
    """A worker's answers as they come.

    A folder that ends the process gets its exit status as the error. After an error the rest is asked of a
    new process: a runtime may be left half-made.
    """
    while folders:
        command = [python, HERE / script, json.dumps(ids), json.dumps(prompts), dtype, *folders]
        last: deque[str] = deque(maxlen=5)
        before = len(folders)
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
                    if "error" in answer:
                        process.kill()
        if len(folders) == before:
            yield folders[0], {"error": f"the process ended with {process.returncode}: {' '.join(last)}"}
            folders = folders[1:]


def row_of(case: Row, runtime: str, answer: Row, truth: Truth) -> Row:
    row = {"runtime": runtime, **{key: value for key, value in case.items() if key != "path"}}
    if "error" in answer:
        return {**row, "loads": False, "error": re.sub(r"/[^ '\":]*/", "", answer["error"])}
    gaps = [abs(one - other) for one, other in zip(answer["scores"], truth.scores, strict=True)]
    difference = mean(gaps)
    agrees = difference < max(AGREES, 2 * truth.noise)  # false for NaN too
    texts = zip(answer["texts"], truth.texts, truth.logits, strict=True)
    same, apart = zip(*(compared(*each) for each in texts), strict=True)
    return {
        **row,
        "loads": True,
        "agrees": agrees,
        "difference": difference,
        "bfloat16_difference": truth.noise,
        "same_tokens": same,
        "gaps": apart,
        "tokens_per_second": answer["tokens_per_second"],
    }


def compared(own: list[int], wanted: list[int], logits: list[torch.Tensor]) -> tuple[int, float]:
    """The number of equal tokens, and what lies between the logits of the first two that differ, else 0."""
    same = next((n for n, (a, b) in enumerate(zip(own, wanted, strict=False)) if a != b), len(wanted))
    if same == len(wanted) or same >= len(own):
        return min(same, len(own)), 0.0 if len(own) >= len(wanted) else float("inf")
    return same, float(logits[same].max() - logits[same][own[same]])


def trial_key(row: Row) -> str:
    """What was tried: runtime, format and settings."""
    keys = ("runtime", "dtype", "format", "bits", "sym", "group_size", "desc_act", "lm_head")
    return json.dumps([row.get(key) for key in keys])


def write_results(rows: list[Row], name: str | None) -> None:
    """Writes the rows, of an artifact if it has a name; those of before that were not tried again stay."""
    path = HERE / "results" / ("runtimes" + f"_{name}" * bool(name) + ".json")
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    tried = {trial_key(row) for row in rows}
    kept = [row for row in before if trial_key(row) not in tried]
    names = [worker.runtime for worker in WORKERS.values()]
    every = sorted(kept + rows, key=lambda row: names.index(row["runtime"]))
    left_out = [name for name in names if name not in {row["runtime"] for row in every}]
    data = {
        "model": name or "the built-in model",
        "machine": machine(torch.get_num_threads()),
        "left_out": left_out,
        "rows": every,
    }
    path.write_text(json.dumps(data, indent=1) + "\n")
    path.with_suffix(".md").write_text(report(data))


if __name__ == "__main__":
    main()
