"""A run, top to bottom. Stages read published folders and publish one; nothing else passes between them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkaq.stages import analyze, calibrate, evaluate, export, merge, quantize, recover
from mkaq.stages.base import ModelStage, Stage, makes_model

if TYPE_CHECKING:
    import torch

    from mkaq.progress import Progress
    from mkaq.ranks import Ranks
    from mkaq.recipe import Recipe
    from mkaq.result import RunResult
    from mkaq.run.job import Job
    from mkaq.run.make import Maker

STAGES: tuple[Stage, ...] = (calibrate, analyze, merge, recover, quantize)
LAST = "export"


def run(
    recipe: Recipe,
    folder: Path,
    device: torch.device,
    progress: Progress,
    *,
    until: str = LAST,
    fresh: bool = False,
    max_memory: int | None = None,
    ranks: Ranks | None = None,
) -> RunResult:
    """Runs a recipe; stages that are there already are used.

    Args:
        recipe: What to do.
        folder: Of the run.
        device: Where layers run.
        progress: Told what happens.
        until: The last stage to run.
        fresh: Make every stage again.
        max_memory: Bytes that it may use; all that the device has if None.
        ranks: The processes that share the calibration samples; None: this one alone.

    Raises:
        MkaqError: Of the kind that fits; earlier stages and artifacts stay as they were.
    """
    from mkaq.budget import meet_budget
    from mkaq.checkpoint.resolve import resolve_model
    from mkaq.checkpoint.validate import open_checkpoint
    from mkaq.digests import describe_files, digest_of
    from mkaq.heap import arrange_heap
    from mkaq.plan import check_resources, output_of, plan_recipe, remarks
    from mkaq.ranks import ALONE
    from mkaq.report import write_report
    from mkaq.result import RunResult, write_log
    from mkaq.run.job import Job
    from mkaq.run.lock import locked
    from mkaq.run.make import Maker

    ranks = ranks or ALONE
    source = open_checkpoint(resolve_model(recipe.model.path, recipe.model.revision))
    for line in remarks(recipe, ranks.size):
        progress.say(line)
    plan = plan_recipe(recipe, source, device, max_memory, ranks.size)
    check_resources(plan, folder, device, max_memory, ranks.local_size)
    arrange_heap(sparing=max_memory is not None)
    with locked(folder) if ranks.main else nullcontext():
        progress.say(f"reading {recipe.model.path}")
        for remark in source.remarks:
            progress.say(f"note: {remark}")
        files = describe_files(source.path, source.files) if ranks.main else []
        ranks.wait()
        maker, budget = Maker(folder, device, progress, fresh, ranks), None

        def job_of(settled: Recipe) -> Job:
            output, seed = output_of(settled, source, progress), settled.calibration.seed
            return Job(source, digest_of(files), output, seed, device, ranks, plan.place, folder)

        try:
            if recipe.budget is not None:
                recipe, budget = meet_budget(
                    recipe, plan.options, lambda tried: make(tried, job_of(tried), maker), progress
                )
            maker.begin()
            if ranks.main:
                (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
            job = make(recipe, job_of(recipe), maker, until)
            result = RunResult(folder, job.sizes, job.evaluation)
            if until == LAST:
                result.artifact = ship(recipe, job, maker, files, budget)
        finally:
            if ranks.main:
                write_log(folder, maker.log, plan, device, ranks)
        if result.artifact and ranks.main:
            write_report(
                result, maker.log, job.path(analyze.NAME) / analyze.SIMILARITY if recipe.merge else None
            )
        return result


def make(recipe: Recipe, job: Job, maker: Maker, until: str = LAST) -> Job:
    """Makes the models of a recipe, one stage after another, each measured on request."""
    measured = evaluate.section(recipe, job.source)
    if measured is not None:
        _evaluate(measured, job, maker)
    for stage in STAGES:
        section = stage.section(recipe, job.source)
        if section is not None and makes_model(stage):
            maker.model(stage, section, job)
            if measured is not None:
                _evaluate(measured, job, maker)
        elif section is not None:
            maker.other(stage, section, job)
        if until == stage.NAME:
            break
    return job


def _evaluate(section: evaluate.PerplexitySection, job: Job, maker: Maker) -> None:
    maker.other(evaluate, section, job, of=job.last)
    name = f"{evaluate.NAME}/{job.last}"
    job.note(name, evaluate.mode(section))
    job.evaluation[job.last] = evaluate.load(job.path(name))


def ship(
    recipe: Recipe, job: Job, maker: Maker, files: list[dict[str, Any]], budget: dict[str, Any] | None
) -> Path:
    """Writes the artifact: the last model, its card and its manifest."""
    from mkaq.card import model_card
    from mkaq.manifest import build_manifest

    manifest = build_manifest(recipe, job, files, budget)
    settings = manifest.model_dump(mode="json", by_alias=True)
    card = model_card(manifest)
    return maker.artifact(
        settings, job.digests(job.last), lambda folder: export.run(job, manifest, card, folder)
    )


def stage_of(name: str) -> ModelStage:
    """The stage that makes a step of a manifest."""
    return next(stage for stage in STAGES if makes_model(stage) and name == stage.NAME)
