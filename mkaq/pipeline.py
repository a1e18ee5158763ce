"""A run, top to bottom. Stages read published folders and publish one; nothing else passes between them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkaq.errors import UsageError
from mkaq.run.quality import Bounds
from mkaq.stages import analyze, calibrate, distill, evaluate, export, merge, quantize, recover, teacher
from mkaq.stages.base import ModelStage, Stage, makes_model

if TYPE_CHECKING:
    import torch

    from mkaq.progress import Progress
    from mkaq.ranks import Ranks
    from mkaq.recipe import Recipe
    from mkaq.result import RunResult
    from mkaq.run.job import Job
    from mkaq.session import Session

STAGES: tuple[Stage, ...] = (calibrate, teacher, analyze, merge, recover, distill, quantize)
LAST = "export"
NAMES = tuple(stage.NAME for stage in (*STAGES, evaluate))
"""What a run links in its folder, beside the artifact."""
_ANY = Bounds()


def run(
    recipe: Recipe,
    folder: Path,
    device: torch.device,
    progress: Progress,
    *,
    until: str = LAST,
    fresh: bool = False,
    strict: bool = False,
    max_memory: int | None = None,
    ranks: Ranks | None = None,
    explain: bool = False,
) -> RunResult:
    """Runs a recipe; published stages are reused.

    Args:
        recipe: The recipe.
        folder: The run's folder.
        device: Where layers run.
        progress: Progress output.
        until: The last stage to run.
        fresh: Make every stage again.
        strict: Refuse a stage that could not do all that the recipe asks.
        max_memory: Memory limit in bytes; the device's memory if None.
        ranks: The processes that share the calibration samples; None: only this one.
        explain: Say why a stage is made.

    Raises:
        MkaqError: Of the matching kind; earlier stages and artifacts are unchanged.
    """
    from mkaq.budget import meet_budget
    from mkaq.session import session

    budget, evaluation = None, recipe.evaluate
    bounds = Bounds(strict, evaluation.limit if evaluation else None)
    _check_until(recipe, until)
    with session(recipe, folder, device, progress, fresh, max_memory, ranks, explain) as active:
        recipe = active.recipe
        if recipe.budget is not None:
            recipe, budget = meet_budget(recipe, active.options, lambda tried: make(tried, active), progress)
        active.begin(recipe)
        job = make(recipe, active, until, bounds)
        return active.end(job, ship(recipe, job, active, budget) if until == LAST else None)


def _check_until(recipe: Recipe, until: str) -> None:
    asked: dict[str, object] = {
        calibrate.NAME: recipe.needs_calibration,
        analyze.NAME: recipe.merge,
        recover.NAME: recipe.layerwise,
        teacher.NAME: recipe.distill,
        LAST: True,
    }
    if not asked.get(until, getattr(recipe, until, None)):
        raise UsageError(
            f"the recipe has no {until}", where="--until", fix="leave it out, or name another stage"
        )


def make(recipe: Recipe, session: Session, until: str = LAST, bounds: Bounds = _ANY) -> Job:
    """Makes the models of a recipe, one stage after another, each evaluated if the recipe asks for it.

    Raises:
        VerificationError: If a model is out of bounds; its stage stays published.
    """
    job = session.job(recipe)
    _measure(recipe, job, session)
    for stage in STAGES:
        section = stage.section(recipe, job.source)
        if section is not None and makes_model(stage):
            session.maker.make_model(stage, section, job)
            bounds.check_stage(job)
            _measure(recipe, job, session)
            bounds.check_perplexity(job)
        elif section is not None:
            session.maker.make(stage, section, job)
        if until == stage.NAME:
            break
    return job


def _measure(recipe: Recipe, job: Job, session: Session) -> None:
    section = evaluate.section(recipe, job.source)
    if section is not None:
        name = session.maker.make(evaluate, section, job, of=job.last)
        job.note(name, evaluate.mode(section))
        job.evaluation[job.last] = evaluate.load(job.path(name))


def ship(recipe: Recipe, job: Job, session: Session, budget: dict[str, Any] | None) -> Path:
    """Publishes the artifact: the last model, its card and its manifest."""
    from mkaq.card import model_card
    from mkaq.manifest import build_manifest, write_manifest

    manifest = build_manifest(recipe, job, session.source_files, budget)
    card, inputs = model_card(manifest), job.digests(job.last)

    def build(folder: Path) -> dict[str, str]:
        files = export.run(job, manifest, card, folder)
        write_manifest(folder, manifest, files)
        return {file["path"]: file["sha256"] for file in files}

    settings = manifest.model_dump(mode="json", by_alias=True)
    return session.maker.publish_artifact(settings, inputs, build)


def stage_of(name: str) -> ModelStage:
    """The stage that made a step of a manifest."""
    return next(stage for stage in STAGES if makes_model(stage) and name == stage.NAME)
