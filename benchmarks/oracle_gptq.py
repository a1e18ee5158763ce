"""mkaq's GPTQ against GPTQModel's: the same model, the same calibration tokens, one run.

usage: python benchmarks/oracle_gptq.py --gptqmodel-python .venv-loader/bin/python [--text FILE]

Both quantize the same model (the built-in one unless --model names a folder); the perplexity of both
checkpoints is measured by mkaq's walk on the same text. GPTQModel runs in a process of its own,
with its defaults. Results go to benchmarks/results/NAME.json and .md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mkaq.calibrate.text import documents
from mkaq.calibrate.tokenizer import load_tokenizer
from mkaq.calibrate.tokens import calibration_tokens, evaluation_sequences
from mkaq.checkpoint.output import Output
from mkaq.checkpoint.resolve import resolve_model
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.digests import library_versions
from mkaq.evaluate.perplexity import Perplexity, perplexity
from mkaq.progress import Progress
from mkaq.quantize.gptq_layers import quantize_gptq
from mkaq.stages.quantize import GptqSection
from mkaq.walk.walk import LayerWalk

CPU = torch.device("cpu")
RESULTS = Path(__file__).parent / "results"
LENGTH = 192


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gptqmodel-python", required=True, help="a Python that has GPTQModel")
    parser.add_argument("--model", default="builtin:tiny-llama")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--calibration-text", help="a text file; English that Python carries if absent")
    parser.add_argument("--text", help="a text file to evaluate on; other builtin documents if absent")
    parser.add_argument("--name", default="oracle_gptq", help="of the results")
    options = parser.parse_args()

    source = open_checkpoint(resolve_model(options.model))
    tokenizer, progress = load_tokenizer(source.path), Progress(quiet=True)
    texts = documents(*text_of(options.calibration_text), "calibrate")
    tokens = calibration_tokens(texts, tokenizer, options.num_samples, LENGTH, 0)
    sequences = evaluation_sequences(documents(*text_of(options.text), "evaluate"), tokenizer, LENGTH)

    def measure(path: Path) -> Perplexity:
        return perplexity(LayerWalk(open_checkpoint(path, quantized=True), CPU), sequences, progress)

    dense = measure(source.path)
    print(f"dense: {dense.perplexity:.4f} over {dense.tokens:,} tokens", flush=True)
    rows: list[dict[str, Any]] = []
    for bits in options.bits:
        with tempfile.TemporaryDirectory() as scratch:
            ours, theirs = Path(scratch, "ours"), Path(scratch, "theirs")
            ours.mkdir()
            save_file({"input_ids": tokens}, Path(scratch, "tokens.safetensors"))
            began = time.perf_counter()
            section = GptqSection(method="gptq", bits=bits, group_size=options.group_size)
            settings = section.options()
            output = Output(source.dtype, 10**10, progress)
            walk, config = LayerWalk(source, CPU), section.config(source.dtype)
            quantize_gptq(walk, tokens, settings, config, ours, output)
            seconds = time.perf_counter() - began
            worker = [
                str(Path(options.gptqmodel_python).absolute()),
                str(Path(__file__).resolve().with_name("gptqmodel_worker.py")),
            ]
            worker += [str(source.path.resolve()), str(Path(scratch, "tokens.safetensors")), str(theirs)]
            worker += ["--bits", str(bits), "--group-size", str(options.group_size)]
            run = subprocess.run(worker, capture_output=True, text=True, cwd=scratch)  # it leaves logs
            if run.returncode:
                sys.exit(run.stderr[-2000:])
            told = json.loads(run.stdout.strip().splitlines()[-1])
            row = {"bits": bits, "ours": measure(ours).perplexity, "theirs": measure(theirs).perplexity}
        row |= {
            "ratio": row["ours"] / row["theirs"],
            "seconds_ours": seconds,
            "seconds_theirs": told["seconds"],
            "oracle": told,
        }
        rows.append(row)
        print(
            f"{bits} bits: mkaq {row['ours']:.4f}, GPTQModel {row['theirs']:.4f}, ratio {row['ratio']:.4f}",
            flush=True,
        )

    RESULTS.mkdir(exist_ok=True)
    record = {
        "dense": dense.as_json(),
        "rows": rows,
        "libraries": library_versions(),
        "options": vars(options),
    }
    for key in ("gptqmodel_python", "text", "calibration_text"):
        record["options"][key] = Path(value).name if (value := record["options"][key]) else None
    (RESULTS / f"{options.name}.json").write_text(json.dumps(record, indent=2) + "\n")
    (RESULTS / f"{options.name}.md").write_text(table(dense, rows, options))
    print(table(dense, rows, options))


def text_of(path: str | None) -> tuple[str, str | None]:
    """Data set and path."""
    return ("text", path) if path else ("builtin", None)


def table(dense: Perplexity, rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    lines = [
        f"`benchmarks/oracle_gptq.py`: {options.model}, group size {options.group_size}, "
        f"{options.num_samples} x {LENGTH} calibration tokens, perplexity over {dense.tokens:,} tokens "
        f"(dense {dense.perplexity:.3f}).",
        "",
        "| bits | mkaq | GPTQModel | mkaq / GPTQModel | seconds mkaq | seconds GPTQModel |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['bits']} | {row['ours']:.3f} | {row['theirs']:.3f} | {row['ratio']:.4f} "
        f"| {row['seconds_ours']:.0f} | {row['seconds_theirs']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
