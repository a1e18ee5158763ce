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
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import baselines
from benchmarks.quality_report import describe, write_report
from benchmarks.quality_text import Text, load_text, measure, text_of, windows
from benchmarks.stages import merged
from mkaq.calibrate.text import documents
from mkaq.calibrate.tokenizer import load_tokenizer
from mkaq.calibrate.tokens import calibration_tokens
from mkaq.checkpoint.output import Output
from mkaq.checkpoint.reader import Checkpoint
from mkaq.checkpoint.resolve import resolve_model
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.digests import describe_files, digest_of, library_versions
from mkaq.errors import MkaqError
from mkaq.files import write_json
from mkaq.fit.hold_out import half_shuffled_samples
from mkaq.heap import arrange_heap
from mkaq.merge.groups import layers_to_remove
from mkaq.merge.segment import groups_of
from mkaq.progress import Progress
from mkaq.quantize.gptq_layers import quantize_gptq
from mkaq.quantize.joint import JointTarget
from mkaq.ranks import ALONE
from mkaq.recover.layerwise import Tuning, recover
from mkaq.stages.quantize import GptqSection
from mkaq.walk.device import compute_dtype, pick_device
from mkaq.walk.walk import LayerWalk

KEY = ("sleb", "channels", "channels+layerwise", "sleb+layerwise")
REST = ("reverse", "shortgpt", "contiguous", "laco", "replaceme", "average", "average-similarity")
JOINT = ("channels", "channels+layerwise")
MERGES: dict[str, dict[str, Any]] = {
    "channels": {"order": "measured", "fuse": "channels"},
    "average": {"order": "back_to_front", "fuse": "average", "coefficient": "similarity"},
    "average-similarity": {"order": "similarity", "fuse": "average", "coefficient": "similarity"},
}
LAYERWISE = "+layerwise"


@dataclass(frozen=True)
class Job:
    """One row: a method, the layers that it removes, and the GPTQ after it."""

    method: str = "dense"
    removed: int = 0
    bits: int | None = None
    joint: bool = False

    @property
    def name(self) -> str:
        """What its row and its checkpoint are called."""
        return f"{self.method}-{self.removed}" + f"-{self.bits}bit" * bool(self.bits) + "-joint" * self.joint

    @property
    def base(self) -> "Job | None":
        """The job whose checkpoint this one starts from, if that is not the source."""
        if self.bits:
            return replace(self, bits=None, joint=False)
        method = self.method.removesuffix(LAYERWISE)
        return replace(self, method=method) if method != self.method else None


@dataclass(frozen=True)
class Made:
    """A checkpoint, the seconds that it took from the source on, and which old layers each layer is."""

    path: Path
    seconds: float
    groups: list[list[int]] | None


class Clock(Progress):
    """Notes when each item was done."""

    def track(self, items: Iterable[Any], what: str, total: int | None = None) -> Iterator[Any]:
        began, self.seconds = time.perf_counter(), list[float]()
        for item in super().track(items, what, total):
            yield item
            self.seconds.append(time.perf_counter() - began)


class Bench:
    """Makes and measures checkpoints of one model.

    Args:
        options: Of the command line.
        source: The model.
        tokens: Calibration tokens, shape (samples, length).
        texts: What is evaluated, by name.
    """

    def __init__(
        self, options: argparse.Namespace, source: Checkpoint, tokens: torch.Tensor, texts: dict[str, Text]
    ) -> None:
        self.source, self.tokens, self.texts = source, tokens, texts
        self.search, self.device = tokens[: options.search_sequences], pick_device(options.device)
        self.walk, self.gptq_samples = self._walk(source), options.gptq_samples
        removals = (layers_to_remove(source.num_layers, r, None, (1, 1)) for r in options.ratios)
        self.removals = sorted(set(removals))
        self.recovery = Tuning(options.recover_steps, "auto", batch_size=32, seed=0)
        self.output = Output(source.dtype, baselines.SHARD_SIZE, Progress())
        made_of = describe_files(source.path, source.files), tokens.tolist()
        made_of += options.search_sequences, options.gptq_samples
        self.folder = Path(options.work, options.name, digest_of(made_of)[:12])
        self.folder.mkdir(parents=True, exist_ok=True)
        measured_on = {name: text.sequences for name, text in texts.items()}
        self.rows = self.folder / f"rows-{digest_of(measured_on)[:12]}.jsonl"

    def finished(self) -> dict[str, Any]:
        """The rows that are there already, by name."""
        lines = self.rows.read_text().splitlines() if self.rows.exists() else []
        return {row["name"]: row for row in map(json.loads, lines)}

    def name(self, job: Job) -> str:
        """A job's name, with the settings that are its own."""
        return job.name.replace(LAYERWISE, f"{LAYERWISE}{self.recovery.steps}")

    def row(self, job: Job) -> dict[str, Any]:
        """Makes what a job asks for, measures it, and keeps the row."""
        made = self.made(job)
        model = open_checkpoint(made.path, quantized=True)
        walk = self._walk(model)
        row = {"name": self.name(job), **asdict(job), "layers": model.num_layers, "bytes": model.nbytes}
        row |= {"dtype": str(self.source.dtype).removeprefix("torch."), "seconds": made.seconds}
        row["texts"] = {name: measure(walk, text) for name, text in self.texts.items()}
        with self.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def made(self, job: Job) -> Made:
        """The checkpoint of a job, found or made."""
        if job == Job():
            return Made(self.source.path, 0.0, [[index] for index in range(self.source.num_layers)])
        folder = self.folder / self.name(job)
        if not folder.exists():
            base = self.made(job.base) if job.base else None  # its time is its own
            before = base.seconds if base else self.sleb(job.removed)[1] if job.method == "sleb" else 0.0
            scratch = folder.with_name(f".{folder.name}")
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            began = time.perf_counter()
            groups = self._make(job, base, scratch)
            seconds = before + time.perf_counter() - began
            write_json(scratch / "made.json", {"seconds": seconds, "groups": groups})
            scratch.rename(folder)
        return Made(folder, **json.loads((folder / "made.json").read_text()))

    def sleb(self, removed: int) -> tuple[list[int], float]:
        """The layers that SLEB removes, and the seconds until it knew: one search for all ratios."""
        path = self.folder / "sleb.json"
        if not path.exists() or len(json.loads(path.read_text())["order"]) < removed:
            order = baselines.sleb(self.walk, self.search, self.removals[-1], clock := Clock())
            write_json(path, {"order": order, "seconds": clock.seconds})
        found = json.loads(path.read_text())
        return found["order"][:removed], found["seconds"][removed - 1]

    def _make(self, job: Job, base: Made | None, folder: Path) -> list[list[int]] | None:
        """Writes a checkpoint; returns the runs of old layers that its layers stand for, if they do."""
        if base:
            step = self._quantize if job.bits else self._recover
            step(job, base, folder)
            return base.groups
        if job.method in MERGES:
            settings = {"layers": job.removed, **MERGES[job.method]}
            made = merged(self.source, self.tokens, settings, folder, self.device, self.output.progress)
            return [sorted(map(int, layer["from"])) for layer in made.facts["layers"]]
        baselines.write_checkpoint(self.source, self._layers(job), folder, self.source.dtype)
        if job.method != "sleb":
            return None
        first, *others = groups_of(self.sleb(job.removed)[0], self.source.num_layers)
        return [list(range(first[-1] + 1)), *others]

    def _layers(self, job: Job) -> Iterable[tuple[int, baselines.Tensors]]:
        """The layers that a published method leaves, as `baselines.write_checkpoint` takes them."""
        walk, removed, count = self.walk, job.removed, self.source.num_layers
        match job.method:
            case "reverse":
                kept = baselines.reverse_order(count, removed)
            case "shortgpt":
                kept = baselines.shortgpt(walk, self.tokens, removed)
            case "contiguous":
                kept = baselines.contiguous(walk, self.tokens, removed)
            case "sleb":
                kept = sorted(set(range(count)) - set(self.sleb(removed)[0]))
            case "laco":
                return baselines.laco_layers(walk, baselines.laco(walk, self.search, removed))
            case "replaceme":
                return baselines.kept_layers(walk, *baselines.replaceme(walk, self.tokens, removed))
        return baselines.kept_layers(walk, kept)

    def _recover(self, job: Job, base: Made, folder: Path) -> None:
        walk = self._walk(open_checkpoint(base.path))
        samples = half_shuffled_samples(ALONE, self.tokens, 0)
        recover(self._walk(self.source), walk, base.groups, samples, self.recovery, folder, self.output)

    def _quantize(self, job: Job, base: Made, folder: Path) -> None:
        model, tokens, target = open_checkpoint(base.path), self.tokens[: self.gptq_samples], None
        if job.joint:
            samples = half_shuffled_samples(ALONE, tokens, 0)
            tokens, target = samples.tokens, JointTarget(self.walk, base.groups, samples)
        names = model.arch.linear_names
        widths = [model.tensors[model.arch.in_layer(0, f"{name}.weight")].shape[1] for name in names]
        size = 32 if any(width % 128 for width in widths) else 128
        section = GptqSection(method="gptq", bits=job.bits, group_size=size)
        settings, config = section.model_dump(exclude={"method", "target"}), section.config(model.dtype)
        quantize_gptq(self._walk(model), tokens, settings, config, folder, self.output, target)

    def _walk(self, model: Checkpoint) -> LayerWalk:
        return LayerWalk(model, self.device, compute_dtype(self.source.dtype, self.device))


def main() -> None:
    options = parse()
    arrange_heap(sparing=False)  # as a run does
    if options.threads:
        torch.set_num_threads(options.threads)
    source = open_checkpoint(resolve_model(options.model))
    tokenizer, count, length = load_tokenizer(source.path), options.num_samples, options.max_seq_length
    texts = documents(*text_of(options.calibration), "calibrate")
    tokens = calibration_tokens(texts, tokenizer, count, length, 0)
    seen = windows(tokens.tolist())
    evaluated = {}
    for name, path in {"python": None, **dict(options.text)}.items():
        evaluated[name] = load_text(path, tokenizer, seen, options.eval_length, options.eval_sequences)
    bench = Bench(options, source, tokens, evaluated)
    record = describe_run(options, bench)
    chosen = jobs(options.methods, bench.removals, options.bits)
    if options.finished:
        chosen = [job for job in chosen if bench.name(job) in bench.finished()]
    record["rows"], record["failed"] = run(bench, chosen)
    print(write_report(record, options.name))


def run(bench: Bench, chosen: Sequence[Job]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows of all jobs, and why there is none of some; says each as it is done."""
    finished, failed, rows, lost = bench.finished(), dict[str, str](), [], set[Job | None]()
    for job in chosen:
        if job.base in lost:
            lost.add(job)
            continue
        try:
            rows.append(finished.get(bench.name(job)) or bench.row(job))
            print(describe(rows[-1]), flush=True)
        except (MkaqError, ValueError, torch.linalg.LinAlgError) as error:
            lost.add(job)
            failed[job.name] = error.what if isinstance(error, MkaqError) else str(error)
            print(f"{job.name}: not possible: {failed[job.name]}", flush=True)
    return rows, failed


def jobs(methods: Sequence[str], removals: Sequence[int], bits: int) -> list[Job]:
    """All jobs, those first of which an interrupted benchmark must have the rows."""
    result = []
    for names in (KEY, REST):
        plain = [Job(name, removed) for removed in removals for name in names if name in methods]
        plain = [Job(), *plain] if names is KEY else plain
        small = [replace(job, bits=bits) for job in plain if bits]
        result += plain + small + [replace(job, joint=True) for job in small if job.method in JOINT]
    return result


def describe_run(options: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """What the results depend on, without this machine's paths."""
    shown = {**vars(options), "text": [f"{name}={path}" for name, path in options.text]}
    config = bench.source.hf_config
    return {
        "command": shlex.join(["python", "-m", "benchmarks.quality", *map(without_folder, sys.argv[1:])]),
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
        "left_out": {name: text.left_out for name, text in bench.texts.items()},
        "options": {key: without_folder(value) for key, value in shown.items()},
        "libraries": library_versions(),
    }


def without_folder(value: Any) -> Any:
    """An argument with the name instead of an absolute path."""
    if isinstance(value, list):
        return [without_folder(item) for item in value]
    before, equals, path = value.rpartition("=") if isinstance(value, str) else ("", "", "")
    return f"{before}{equals}{Path(path).name}" if Path(path).is_absolute() else value


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
    add("--methods", nargs="+", choices=(*KEY, *REST), default=(*KEY, *REST))
    add("--bits", type=int, choices=(0, 2, 3, 4, 8), default=4, help="of GPTQ; 0 leaves it out")
    add("--device", default="cpu")
    add("--threads", type=int)
    add("--finished", action="store_true", help="report the rows that are there, make none")
    add("--name", default="quality", help="of the results")
    add("--work", metavar="DIR", default="runs/benchmarks", help="where checkpoints and rows are kept")
    return parser.parse_args()


if __name__ == "__main__":
    main()
