"""mkaq beside GPTQModel, llm-compressor and bitsandbytes: time, memory, bytes and perplexity.

usage: python -m benchmarks.speed --gptqmodel-python .venv-loader/bin/python
                                  --llmcompressor-python .venv-llmcompressor/bin/python

Every product quantizes the same model on the same calibration tokens at equal settings, each run in a
process of its own, product after product, round after round, all with the same number of threads and
no GPU. A first round on few tokens is not counted: products compile and cache things once. Perplexity
of everything that was written is measured by mkaq's walk in float32, on text of which calibration has
seen no 32 tokens in a row. A peer whose Python is not given is left out, and the results say so.

`make .venv-loader/ready` makes the environment of GPTQModel (it needs a C compiler), and this that of
llm-compressor, which wants other versions than mkaq does:

    python3 -m venv .venv-llmcompressor
    .venv-llmcompressor/bin/pip install torch==2.13.0 'llmcompressor==0.14.*'

(with `--extra-index-url https://download.pytorch.org/whl/cpu` where PyPI's torch brings CUDA).
bitsandbytes runs in mkaq's own environment. Results go to benchmarks/results/NAME.json and .md.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

import mkaq
from benchmarks.machine import command_line, machine, without_folder
from benchmarks.memory import RESULTS
from benchmarks.packed import write_dense
from benchmarks.process_tree import CommandError, Measured, run_measured
from benchmarks.quality_text import Text, load_text, measure, windows
from benchmarks.speed_report import describe, table
from mkaq.calibrate.text import documents
from mkaq.calibrate.tokenizer import load_tokenizer
from mkaq.calibrate.tokens import calibration_tokens
from mkaq.checkpoint.resolve import resolve_model
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.digests import library_versions
from mkaq.walk.walk import LayerWalk

CPU = torch.device("cpu")
HERE = Path(__file__).resolve().parent
WARM_UP, TOKENS_AT_ONCE, TOLERANCE = 8, 4096, 1e-5
MKAQ = [sys.executable, "-c", "from mkaq.cli import main; main()", "run"]


@dataclass(frozen=True)
class Calibration:
    """The same tokens as a file for the peers, and as mkaq's recipe chooses them."""

    path: Path
    tokens: torch.Tensor

    @property
    def section(self) -> dict[str, Any]:
        """Of a recipe."""
        count, length = self.tokens.shape
        return {"dataset": "builtin", "num_samples": count, "max_seq_length": length, "seed": 0}


@dataclass(frozen=True)
class Product:
    """What is measured: a product and how it is set.

    Attributes:
        name: Of its row.
        command: The command that quantizes, from the calibration and the folder to write.
        settings: How it is set where products differ.
    """

    name: str
    command: Callable[[Calibration, Path], list[str]]
    settings: str

    def told(self, run: Measured, folder: Path) -> dict[str, Any]:
        """What a worker says on its last line, and mkaq in run.json: `seconds` of quantization, `threads`."""
        if not self.is_mkaq:
            return json.loads(run.stdout.strip().splitlines()[-1])
        log = json.loads((folder / "run.json").read_text())
        stages = {stage["stage"]: stage["seconds"] for stage in log["stages"]}
        return {"seconds": stages["quantize"], "stages": stages, "threads": log["threads"]}

    def checkpoint(self, folder: Path) -> Path:
        """Where its weights are."""
        return folder / "artifact" if self.is_mkaq else folder

    @property
    def is_mkaq(self) -> bool:
        """Whether it is this project."""
        return self.name.startswith("mkaq")


def main() -> None:
    options = parse()
    source = open_checkpoint(resolve_model(options.model))
    tokenizer, count, length = load_tokenizer(source.path), options.num_samples, options.max_seq_length
    found = documents("builtin", None, "calibrate")
    tokens = calibration_tokens(found, tokenizer, count, length, 0)
    seen = windows(tokens.tolist())
    texts = {
        name: load_text(path, tokenizer, seen, options.eval_length, options.eval_sequences)
        for name, path in options.text or [("builtin", None)]
    }
    products, left_out = products_of(options, source.path.resolve())
    with tempfile.TemporaryDirectory() as scratch:
        rows = run_all(products, tokens, options, Path(scratch))
        for row, product in zip(rows, products, strict=True):
            row |= weigh(product, options, texts, Path(scratch))
            print(describe(row), flush=True)
    dense = {
        "product": "source",
        "bytes": weight_bytes(source.path),
        "texts": perplexities(source.path, texts),
    }
    record = {
        "command": command_line("speed"),
        "machine": machine(options.threads),
        "model": {"name": without_folder(options.model), "parameters": source.parameters},
        "settings": {"bits": 4, "group_size": options.group_size, "act_order": options.act_order},
        "calibration": {"tokens": [count, length], "rows_at_once": rows_at_once(options)},
        "texts": {name: {"sequences": len(text.sequences)} for name, text in texts.items()},
        "libraries": {"mkaq": mkaq.__version__, **library_versions()},
        "left_out": left_out,
        "rows": [dense, *rows],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{options.name}.json").write_text(json.dumps(record, indent=2) + "\n")
    (RESULTS / f"{options.name}.md").write_text(table(record))
    print(table(record))


def products_of(options: argparse.Namespace, model: Path) -> tuple[list[Product], list[str]]:
    """The products that can run here, and the names of those that cannot."""
    plain = ["--bits", "4", "--group-size", str(options.group_size), "--damp-percent", "0.01"]
    plain += ["--batch-size", str(rows_at_once(options))]
    order = ["--act-order"] if options.act_order else []
    columns = [] if options.act_order else ["--no-group-aware"]
    gptq: dict[str, Any] = {"method": "gptq", "bits": 4, "group_size": options.group_size}
    gptq |= {"desc_act": True, "static_groups": True} if options.act_order else {}
    nf4 = {"method": "bitsandbytes", "bits": 4, "quant_type": "nf4", "double_quant": True}

    def mkaq_run(quantize: dict[str, Any]) -> Callable[[Calibration, Path], list[str]]:
        def command(calibration: Calibration, out: Path) -> list[str]:
            recipe = {"version": 1, "name": "speed", "model": {"path": str(model)}, "merge": None}
            recipe |= {"quantize": quantize, "evaluate": None}
            if quantize["method"] == "gptq":
                recipe["calibration"] = calibration.section
            path = out.with_suffix(".yaml")
            path.write_text(yaml.safe_dump(recipe))
            return [*MKAQ, str(path), "--output", str(out), "--device", "cpu"]

        return command

    def worker(python: str, name: str, *arguments: str) -> Callable[[Calibration, Path], list[str]]:
        start = [str(Path(python).absolute()), str(HERE / f"{name}_worker.py"), str(model)]
        return lambda calibration, out: [*start, str(calibration.path), str(out), *arguments]

    products, left_out = (
        [Product("mkaq", mkaq_run(gptq), "computes and writes in bfloat16, Hessians and solver in float32")],
        [],
    )
    if python := options.gptqmodel_python:
        arguments = [*plain, *columns]
        as_it_comes = worker(python, "gptqmodel", *arguments)
        products.append(Product("GPTQModel", as_it_comes, "bfloat16 and offload_to_disk, its defaults"))
        for dtype in ("bfloat16", "float32"):
            command = worker(python, "gptqmodel", *arguments, "--no-offload", "--dtype", dtype)
            products.append(Product(f"GPTQModel {dtype}", command, f"{dtype}, offload_to_disk=False"))
    else:
        left_out.append("GPTQModel")
    if python := options.llmcompressor_python:
        for dtype in ("bfloat16", "float32"):
            command = worker(python, "llmcompressor", *plain, *order, "--dtype", dtype)
            settings = f'{dtype}, pipeline="sequential", batched_quantization=8'
            products.append(Product(f"llm-compressor {dtype}", command, settings))
    else:
        left_out.append("llm-compressor")
    products.append(Product("mkaq nf4", mkaq_run(nf4), "bitsandbytes, double_quant, driven layer by layer"))
    nf4_start = [sys.executable, str(HERE / "bitsandbytes_worker.py"), str(model)]
    settings = "transformers, bfloat16, double_quant; seconds of quantizing are those of loading"
    products.append(Product("bitsandbytes nf4", lambda _, out: [*nf4_start, str(out)], settings))
    return products, left_out


def rows_at_once(options: argparse.Namespace) -> int:
    """Calibration rows that every product takes at a time, mkaq included."""
    return min(options.num_samples, max(1, TOKENS_AT_ONCE // options.max_seq_length))


def run_all(
    products: list[Product], tokens: torch.Tensor, options: argparse.Namespace, scratch: Path
) -> list[dict[str, Any]]:
    """Seconds and peak memory of every product in every round; keeps what the last round wrote.

    Raises:
        SystemExit: If a product fails, or runs with another number of threads.
        AssertionError: If mkaq chose other tokens.
    """
    rows: list[dict[str, Any]] = [{"product": p.name, "settings": p.settings, "runs": []} for p in products]
    for turn in range(options.repeats + 1):
        part = tokens[: WARM_UP if turn == 0 else None]
        calibration = Calibration(scratch / "tokens.safetensors", part)
        save_file({"input_ids": part.contiguous()}, calibration.path)
        for row, product in zip(rows, products, strict=True):
            out = folder_of(product, scratch)
            shutil.rmtree(out, ignore_errors=True)
            run = run_product(product, product.command(calibration, out), options, scratch)
            told = product.told(run, out)
            if product.is_mkaq and (chosen := out / "calibrate" / "calibration.safetensors").exists():
                assert torch.equal(load_file(chosen)["input_ids"], part), "mkaq calibrates on other tokens"
            if told["threads"] != options.threads:
                sys.exit(f"{product.name}: ran with {told['threads']} threads")
            if turn:
                row["told"] = told
                row["runs"].append(
                    {"seconds": run.seconds, "quantize": told["seconds"], "peak_bytes": run.peak_bytes}
                )
            print(f"round {turn}: {product.name}: {run.seconds:.1f} s", flush=True)
    for row in rows:
        for key in row["runs"][0]:
            row[key] = statistics.median(run[key] for run in row["runs"])
    return rows


def folder_of(product: Product, scratch: Path) -> Path:
    return scratch / product.name.replace(" ", "-")


def run_product(product: Product, command: list[str], options: argparse.Namespace, scratch: Path) -> Measured:
    """Runs one command to its end, in an environment that is the same for all."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {f"{library}_NUM_THREADS": str(options.threads) for library in ("OMP", "MKL", "OPENBLAS")}
    env |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    if product.is_mkaq:
        env["PYTHONPATH"] = str(Path(mkaq.__file__).parents[1])
    try:
        return run_measured(command, env=env, cwd=scratch)  # peers leave logs where they run
    except CommandError as error:
        sys.exit(f"{product.name}: {error}")


def weigh(
    product: Product, options: argparse.Namespace, texts: dict[str, Text], scratch: Path
) -> dict[str, Any]:
    """Bytes and perplexity of what a product wrote."""
    folder = product.checkpoint(folder_of(product, scratch))
    result: dict[str, Any] = {"bytes": weight_bytes(folder)}
    if product.name.startswith("llm-compressor"):
        dense = folder.with_name(f"{folder.name}-dense")
        write_dense(folder, dense)
        tokens, logits = scratch / "tokens.safetensors", folder.with_suffix(".logits")
        command = [options.llmcompressor_python, str(HERE / "llmcompressor_worker.py"), str(folder)]
        command = [str(Path(command[0]).absolute()), *command[1:], str(tokens), str(logits), "--read"]
        run_product(product, command, options, scratch)
        theirs, ours = load_file(logits)["logits"], logits_of(dense, load_file(tokens)["input_ids"][:1])
        result["reader_error"] = ((ours - theirs).norm() / theirs.norm()).item()
        if not result["reader_error"] <= TOLERANCE:  # NaN neither
            sys.exit(f"{product.name}: its reader's logits differ by {result['reader_error']:.2e}")
        folder = dense
    return {**result, "texts": perplexities(folder, texts)}


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def perplexities(folder: Path, texts: dict[str, Text]) -> dict[str, Any]:
    walk = LayerWalk(open_checkpoint(folder, quantized=True), CPU)
    return {name: measure(walk, text) for name, text in texts.items()}


@torch.no_grad()
def logits_of(folder: Path, row: torch.Tensor) -> torch.Tensor:
    """Logits of one row of tokens by mkaq's walk, shape (length, vocabulary)."""
    walk = LayerWalk(open_checkpoint(folder), CPU)
    hidden_states = walk.embed(row)
    for index in range(walk.num_layers):
        walk.pass_layer(index, hidden_states)
    with walk.head() as head:
        return head(hidden_states)[0].float()


def parse() -> argparse.Namespace:
    """The command line."""

    def named_file(value: str) -> tuple[str, str]:
        name, equals, path = value.partition("=")
        if not equals or not Path(path).is_file():
            raise argparse.ArgumentTypeError(f"{value} is not NAME=FILE")
        return name, path

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="builtin:tiny-llama", help="a folder or a built-in model")
    add("--gptqmodel-python", metavar="PYTHON", help="a Python that has GPTQModel")
    add("--llmcompressor-python", metavar="PYTHON", help="a Python that has llm-compressor")
    add("--group-size", type=int, default=64)
    add(
        "--act-order",
        action="store_true",
        help="by falling activation, groups fixed (GPTQModel: within them)",
    )
    add("--num-samples", type=int, default=128, help="calibration sequences of the builtin text")
    add("--max-seq-length", type=int, default=256, help="tokens of each")
    add("--text", metavar="NAME=FILE", type=named_file, action="append", help="evaluated; builtin if absent")
    add("--eval-length", type=int, default=256, help="tokens of each evaluated sequence")
    add("--eval-sequences", type=int, help="at most so many of each text, spread over it")
    add("--repeats", type=int, default=5)
    add("--threads", type=int, default=os.cpu_count(), help="of every product")
    add("--name", default="speed", help="of the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
