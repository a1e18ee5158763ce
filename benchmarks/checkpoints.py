"""The checkpoints that the benchmarks of quality compare: each is made once and kept in a work folder."""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import baselines
from benchmarks.distilled import DISTILL, Lessons
from benchmarks.stages import merged
from mkaq.checkpoint.output import Output
from mkaq.checkpoint.reader import Checkpoint
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.digests import describe_files, digest_of
from mkaq.errors import MkaqError
from mkaq.files import write_json
from mkaq.fit.hold_out import calibration_samples
from mkaq.merge.segment import groups_of
from mkaq.progress import Progress
from mkaq.quantize.gptq_layers import quantize_gptq
from mkaq.quantize.joint import JointTarget
from mkaq.ranks import ALONE
from mkaq.recover.layerwise import recover
from mkaq.recover.steps import Tuning
from mkaq.stages.quantize import GptqSection
from mkaq.walk.device import compute_dtype
from mkaq.walk.walk import LayerWalk

MERGES: dict[str, dict[str, Any]] = {
    "channels": {"order": "measured", "fuse": "channels"},
    "average": {"order": "back_to_front", "fuse": "average", "coefficient": "similarity"},
    "average-similarity": {"order": "similarity", "fuse": "average", "coefficient": "similarity"},
}
LAYERWISE = "+layerwise"
CHECKS = "checks.json"  # of a job that distils, what was measured while it learned


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
    def distils(self) -> bool:
        """Whether its own step is distillation."""
        return self.method.endswith(DISTILL) and not self.bits

    @property
    def base(self) -> "Job | None":
        """The job whose checkpoint this one starts from, if that is not the source."""
        if self.bits:
            return replace(self, bits=None, joint=False)
        method, step, _ = self.method.rpartition("+")
        return replace(self, method=method) if step else None


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


@dataclass(frozen=True)
class Settings:
    """How checkpoints are made.

    Attributes:
        removals: The numbers of layers that SLEB removes: one search finds them all.
        search_sequences: The calibration sequences on which SLEB and LaCo search.
        gptq_samples: The calibration sequences for GPTQ.
        recover_steps: Optimizer steps of layerwise recovery, for each layer.
        group_size: Weights per scale of GPTQ; None for 128, or 32 where a width is no multiple of 128.
        lessons: What distillation teaches; None if there is none.
    """

    removals: Sequence[int]
    search_sequences: int
    gptq_samples: int
    recover_steps: int
    group_size: int | None = None
    lessons: Lessons | None = None


class Maker:
    """Makes the checkpoints of one model's jobs.

    Args:
        source: The model.
        tokens: Calibration tokens, shape (samples, length).
        settings: How.
        folder: The parent of the work folder; the work folder's own name tells what it depends on.
        device: Where layers run.

    Attributes:
        folder: The work folder.
    """

    def __init__(
        self,
        source: Checkpoint,
        tokens: torch.Tensor,
        settings: Settings,
        folder: Path,
        device: torch.device,
    ) -> None:
        self.source, self.tokens, self.settings, self.device = source, tokens, settings, device
        self.search, self.gptq_samples = tokens[: settings.search_sequences], settings.gptq_samples
        self.walk, self.removals = self.walk_over(source), sorted(set(settings.removals))
        self.recovery = Tuning(settings.recover_steps, "auto", batch_size=32, seed=0)
        self.output = Output(source.dtype, baselines.SHARD_SIZE, Progress())
        made_of: tuple[Any, ...] = describe_files(source.path, source.files), tokens.tolist()
        made_of += settings.search_sequences, settings.gptq_samples
        made_of += (settings.group_size,) if settings.group_size else ()
        self.folder = folder / digest_of(made_of)[:12]
        self.folder.mkdir(parents=True, exist_ok=True)

    def name(self, job: Job) -> str:
        """A job's name, with the settings that are its own."""
        name = job.name.replace(LAYERWISE, f"{LAYERWISE}{self.recovery.steps}")
        lessons = self.settings.lessons
        return name.replace(DISTILL, f"{DISTILL}{lessons.name}") if lessons else name

    def made(self, job: Job) -> Made:
        """The checkpoint of a job, found or made."""
        if job == Job():
            return Made(self.source.path, 0.0, [[index] for index in range(self.source.num_layers)])
        folder = self.folder / self.name(job)
        if not folder.exists():
            base = self.made(job.base) if job.base else None  # its time is its own
            before = base.seconds if base else self.sleb(job.removed)[1] if job.method == "sleb" else 0.0
            if job.distils and self.settings.lessons:
                before += self.settings.lessons.teach(self.walk, self._teacher)
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
            step = self._quantize if job.bits else self._distill if job.distils else self._recover
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
        walk = self.walk_over(open_checkpoint(base.path))
        samples = calibration_samples(ALONE, self.tokens, 0)
        recover(self.walk_over(self.source), walk, base.groups, samples, self.recovery, folder, self.output)

    @property
    def _teacher(self) -> Path:
        assert self.settings.lessons
        return self.folder / f"teacher-{self.settings.lessons.said}"

    def _distill(self, job: Job, base: Made, folder: Path) -> None:
        assert self.settings.lessons
        model = LayerWalk(open_checkpoint(base.path), self.device)
        checks = self.settings.lessons.learn(model, self._teacher, folder, self.output)
        write_json(folder / CHECKS, checks)

    def _quantize(self, job: Job, base: Made, folder: Path) -> None:
        model, tokens, target = open_checkpoint(base.path), self.tokens[: self.gptq_samples], None
        if job.joint:
            samples = calibration_samples(ALONE, tokens, 0)
            tokens, target = samples.tokens, JointTarget(self.walk, base.groups, samples)
        names = model.arch.linear_names
        widths = [model.tensors[model.arch.in_layer(0, f"{name}.weight")].shape[1] for name in names]
        size = self.settings.group_size or (32 if any(width % 128 for width in widths) else 128)
        section = GptqSection(method="gptq", bits=job.bits, group_size=size)
        settings, config = section.options(), section.config(model.dtype)
        quantize_gptq(self.walk_over(model), tokens, settings, config, folder, self.output, target)

    def walk_over(self, model: Checkpoint) -> LayerWalk:
        """A walk in the dtype that everything is made and measured in."""
        return LayerWalk(model, self.device, compute_dtype(self.source.dtype, self.device))


def rows_of(
    chosen: Iterable[Job],
    row_of: Callable[[Job], dict[str, Any] | None],
    describe: Callable[[dict[str, Any]], str],
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows of all jobs, and why there is none of some; says each as it is done.

    Args:
        chosen: The jobs; what starts from a job that is not possible is left out.
        row_of: Finds or makes a row; None if there is none.
        describe: A row in one line.
    """
    rows, failed, lost = list[dict[str, Any]](), dict[str, str](), set[Job | None]()
    for job in chosen:
        if job.base in lost:
            lost.add(job)
            continue
        try:
            if row := row_of(job):
                rows.append(row)
                print(describe(row), flush=True)
        except (MkaqError, ValueError, torch.linalg.LinAlgError) as error:
            lost.add(job)
            failed[job.name] = error.what if isinstance(error, MkaqError) else str(error)
            print(f"{job.name}: not possible: {failed[job.name]}", flush=True)
    return rows, failed
