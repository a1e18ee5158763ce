"""A run's session: the checks before the first stage, and the report and log after the last."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mkaq.budget import Option
from mkaq.checkpoint.reader import Checkpoint
from mkaq.checkpoint.resolve import resolve_model
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.digests import describe_files, digest_of
from mkaq.heap import arrange_heap
from mkaq.pipeline import NAMES
from mkaq.plan import RunPlan, check_resources, output_of, plan_recipe, remarks, too_long
from mkaq.progress import Progress, clock
from mkaq.ranks import ALONE, Ranks
from mkaq.recipe import Recipe
from mkaq.report import write_report
from mkaq.result import RunResult
from mkaq.run.job import Job
from mkaq.run.lock import locked
from mkaq.run.log import write_log
from mkaq.run.make import Maker
from mkaq.run.publish import ARTIFACT
from mkaq.run.quality import fallbacks_of
from mkaq.run.schedule import Schedule
from mkaq.stages import analyze
from mkaq.units import duration
from mkaq.walk.activations import PLACES

LONG = 600.0  # seconds of a stage that keeps each layer that it finishes


@dataclass(frozen=True)
class Session:
    """A run in progress.

    Attributes:
        recipe: The recipe, with the defaults of the model's family.
        folder: The run's folder.
        source: The model to compress.
        source_files: Path, bytes and sha256 of its files; empty except in the first process.
        plan: The expected sizes, memory and disk space.
        device: Where layers run.
        ranks: The processes.
        progress: Progress output.
        maker: Makes stages.
        long: The stages that are expected to take so long that they keep each layer that they finish.
    """

    recipe: Recipe
    folder: Path
    source: Checkpoint
    source_files: list[dict[str, Any]]
    plan: RunPlan
    device: torch.device
    ranks: Ranks
    progress: Progress
    maker: Maker
    long: frozenset[str]

    @property
    def options(self) -> Sequence[Option]:
        """The options of a budget."""
        return self.plan.options

    def job(self, recipe: Recipe) -> Job:
        """A new job for a recipe."""
        output, seed = output_of(recipe, self.source, self.progress), recipe.calibration.seed
        digest, place = digest_of(self.source_files), self.plan.place
        return Job(self.source, digest, output, seed, self.device, self.ranks, place, self.folder, self.long)

    def begin(self, recipe: Recipe) -> None:
        """Writes the resolved recipe to recipe.yaml and prepares the folder for its stages."""
        if self.ranks.is_main:
            self.maker.begin()
            (self.folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")

    def end(self, job: Job, artifact: Path | None) -> RunResult:
        """The result of the run; writes the report if there is an artifact."""
        result = RunResult(self.folder, job.sizes, job.evaluation, fallbacks_of(job.steps), artifact)
        if artifact and self.ranks.is_main:
            similarity = job.path(analyze.NAME) / analyze.SIMILARITY if job.has(analyze.NAME) else None
            write_report(result, self.maker.log, similarity)
        return result


@contextmanager
def session(
    recipe: Recipe,
    folder: Path,
    device: torch.device,
    progress: Progress,
    fresh: bool,
    max_memory: int | None,
    ranks: Ranks | None,
    explain: bool,
) -> Iterator[Session]:
    """Checks everything, then holds the run's folder for a `with` block; arguments as for `pipeline.run`.

    Raises:
        MkaqError: If the recipe does not fit the model or the machine, or the folder is in use.
    """
    ranks = ranks or ALONE
    source = open_checkpoint(resolve_model(recipe.model.path, recipe.model.revision))
    recipe = recipe.fitted(source.arch)
    for line in remarks(recipe, ranks.size):
        progress.say(line)
    plan = plan_recipe(recipe, source, device, max_memory, ranks.size)
    check_resources(plan, folder, device, max_memory, ranks.local_size)
    plan = replace(plan, place=PLACES[int(ranks.maximum(PLACES.index(plan.place)))])  # one for all processes
    arrange_heap(sparing=max_memory is not None)
    with locked(folder, NAMES) if ranks.is_main else nullcontext():
        progress.say(f"reading {recipe.model.path}")
        for remark in source.remarks:
            progress.say(f"note: {remark}")
        files = describe_files(source.path, source.files) if ranks.is_main else []
        ranks.barrier()
        expected = plan.seconds(source, device, folder) if ranks.is_main else {}
        schedule = Schedule(expected)
        total = sum(expected.values())
        if total >= 1 and recipe.budget is None:
            progress.say(f"expected to take about {duration(total)}, until {clock(schedule.end())}")
            for line in too_long(expected, device):
                progress.say(line)
            progress.end_of_run = schedule.end
        maker = Maker(folder, device, progress, fresh, ranks, schedule, explain)
        shipped = _identity(folder / ARTIFACT)
        try:
            long = frozenset(stage for stage, seconds in expected.items() if seconds > LONG)
            yield Session(recipe, folder, source, files, plan, device, ranks, progress, maker, long)
        except BaseException as error:
            if shipped and shipped == _identity(folder / ARTIFACT):
                progress.say(f"note: {folder / ARTIFACT} is still that of an earlier run")
            if isinstance(error, OSError) and error.errno and error.filename is None:  # of a write
                raise OSError(error.errno, error.strerror, str(folder)) from error
            raise
        finally:
            if ranks.is_main:
                write_log(folder, maker.log, plan, expected, device, ranks)


def _identity(folder: Path) -> int:
    """A number that another folder of the same name does not have; 0 if there is none."""
    return folder.stat().st_ino if folder.exists() else 0
