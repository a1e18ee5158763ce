"""What removing layers costs: mkaq's merges beside the published ways, with and without GPTQ after them.

usage: python -m benchmarks.quality [--model FOLDER] [--text NAME=FILE]... [--ratios 0.25 0.4375]

Every method sees the same calibration tokens, removes the same number of layers and is measured by
mkaq's walk on the same sequences of every text. No 32 tokens in a row of these are calibration
tokens. Sequences are cut within documents, and standard errors are taken over documents.

Checkpoints and finished rows stay in a work folder, and a benchmark that was interrupted goes on
where it was; the rows that matter most come first. Results go to benchmarks/results/NAME.json, .md
and .png.
"""

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoints import Job, Maker, Settings, rows_of
from benchmarks.distilled import CONTROL, LEARNED, Lessons, add_arguments, lessons_of
from benchmarks.machine import command_line, without_folder
from benchmarks.quality_report import describe, write_report
from benchmarks.quality_text import Text, calibration_of, load_text, measure, windows
from mkaq.calibrate.tokenizer import load_tokenizer
from mkaq.checkpoint.reader import Checkpoint
from mkaq.checkpoint.resolve import resolve_model
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.digests import digest_of, library_versions
from mkaq.heap import arrange_heap
from mkaq.merge.groups import layers_to_remove
from mkaq.walk.device import pick_device

KEY = ("sleb", "channels", "channels+layerwise", "sleb+layerwise")
REST = ("reverse", "shortgpt", "contiguous", "laco", "replaceme", "average", "average-similarity")
JOINT = ("channels", "channels+layerwise")


class Bench(Maker):
    """Makes and measures checkpoints of one model.

    Args:
        options: Of the command line.
        source: The model.
        tokens: Calibration tokens, shape (samples, length).
        texts: What is evaluated, by name.
        lessons: What distillation teaches; None if there is none.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        source: Checkpoint,
        tokens: torch.Tensor,
        texts: dict[str, Text],
        lessons: Lessons | None,
    ) -> None:
        settings = Settings(
            [layers_to_remove(source.num_layers, ratio, None, (1, 1)) for ratio in options.ratios],
            options.search_sequences,
            options.gptq_samples,
            options.recover_steps,
            lessons=lessons,
        )
        super().__init__(
            source, tokens, settings, Path(options.work, options.name), pick_device(options.device)
        )
        self.texts = texts
        measured_on = {name: text.sequences for name, text in texts.items()}
        self.rows = self.folder / f"rows-{digest_of(measured_on)[:12]}.jsonl"

    def finished(self) -> dict[str, Any]:
        """The rows that are there already, by name."""
        lines = self.rows.read_text().splitlines() if self.rows.exists() else []
        return {row["name"]: row for row in map(json.loads, lines)}

    def row(self, job: Job) -> dict[str, Any]:
        """Makes what a job asks for, measures it, and keeps the row."""
        made = self.made(job)
        model = open_checkpoint(made.path, quantized=True)
        walk = self.walk_over(model)
        row = {"name": self.name(job), **asdict(job), "layers": model.num_layers, "bytes": model.nbytes}
        row |= {"dtype": str(self.source.dtype).removeprefix("torch."), "seconds": made.seconds}
        row["texts"] = {name: measure(walk, text) for name, text in self.texts.items()}
        with self.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row


def main() -> None:
    options = parse()
    arrange_heap(sparing=False)  # as a run does
    if options.threads:
        torch.set_num_threads(options.threads)
    source = open_checkpoint(resolve_model(options.model))
    tokenizer, count, length = load_tokenizer(source.path), options.num_samples, options.max_seq_length
    given = [options.calibration] if options.calibration else []
    tokens = calibration_of(given, tokenizer, count, length)
    lessons = lessons_of(options, tokenizer, source.sizes.hidden)
    seen, evaluated = windows(tokens.tolist()), dict[str, Text]()
    if lessons:
        seen |= windows(lessons.text.tokens.tolist())
    for name, path in {"python": None, **dict(options.text)}.items():
        evaluated[name] = load_text(path, tokenizer, seen, options.eval_length, options.eval_sequences)
    bench = Bench(options, source, tokens, evaluated, lessons)
    record = describe_run(options, bench, evaluated, "quality")
    chosen, finished = jobs(options.methods, bench.removals, options.bits), bench.finished()
    if options.finished:
        chosen = [job for job in chosen if bench.name(job) in finished]

    def row_of(job: Job) -> dict[str, Any]:
        return finished.get(bench.name(job)) or bench.row(job)

    record["rows"], record["failed"] = rows_of(chosen, row_of, describe)
    print(write_report(record, options.name))


def jobs(methods: Sequence[str], removals: Sequence[int], bits: int) -> list[Job]:
    """All jobs, those first of which an interrupted benchmark must have the rows."""
    result = []
    for names in (KEY, LEARNED, REST):
        wanted = [name for name in names if name in methods]
        plain = [Job(name, removed) for removed in removals for name in wanted if name != CONTROL]
        plain = [Job(), *plain] if names is KEY else plain
        plain += [Job(name) for name in wanted if name == CONTROL]
        small = [replace(job, bits=bits) for job in plain if bits]
        result += plain + small + [replace(job, joint=True) for job in small if job.method in JOINT]
    return result


def describe_run(
    options: argparse.Namespace, bench: Maker, texts: dict[str, Text], module: str
) -> dict[str, Any]:
    """What the results of a benchmark (a module here) depend on, without this machine's paths."""
    shown = {**vars(options), "text": [f"{name}={path}" for name, path in options.text]}
    config = bench.source.hf_config
    return {
        "command": command_line(module),
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "cpu",
        },
        "model": {
            "name": without_folder(options.model),
            "type": config.model_type,
            "layers": bench.source.num_layers,
            "hidden_size": config.hidden_size,
            "parameters": bench.source.parameters,
        },
        "calibration": list(bench.tokens.shape),
        "left_out": {name: text.left_out for name, text in texts.items()},
        "options": {key: without_folder(value) for key, value in shown.items()},
        "libraries": library_versions(),
    }


def parse() -> argparse.Namespace:
    """The command line."""

    def named_file(value: str) -> tuple[str, str]:
        name, equals, path = value.partition("=")
        if not (name and equals and path):
            raise argparse.ArgumentTypeError(f"{value!r} is not NAME=FILE")
        return name, path

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="builtin:tiny-llama")
    add("--calibration", metavar="FILE", help="a text file; English that Python carries if absent")
    add("--text", metavar="NAME=FILE", type=named_file, action="append", default=[], help="evaluated too")
    add("--ratios", type=float, nargs="+", default=[0.25, 0.4375], help="shares of the layers to remove")
    add("--num-samples", type=int, default=512, help="calibration sequences")
    add("--max-seq-length", type=int, default=128, help="tokens of each")
    add("--search-sequences", type=int, default=64, help="of these, on which SLEB and LaCo search")
    add("--gptq-samples", type=int, default=256, help="of these, for GPTQ")
    add("--eval-sequences", type=int, help="at most so many of each text, spread over it")
    add("--eval-length", type=int, default=128, help="tokens of each")
    add("--recover-steps", type=int, default=100, help="of layerwise recovery, for each layer")
    add("--methods", nargs="+", choices=(*KEY, *LEARNED, *REST), default=(*KEY, *LEARNED, *REST))
    add_arguments(add)
    add("--bits", type=int, choices=(0, 2, 3, 4, 8), default=4, help="of GPTQ; 0 leaves it out")
    add("--device", default="cpu")
    add("--threads", type=int)
    add("--finished", action="store_true", help="report the rows that are there, make none")
    add("--name", default="quality", help="of the results")
    add("--work", metavar="DIR", default="runs/benchmarks", help="where checkpoints and rows are kept")
    return parser.parse_args()


if __name__ == "__main__":
    main()
