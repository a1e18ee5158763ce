"""A run, top to bottom. Stages read published folders and publish one; nothing else passes between them."""

from __future__ import annotations

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
    from mkaq.session import Session

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
    """Runs a recipe; published stages are reused.

    Args:
        recipe: The recipe.
        folder: The run's folder.
        device: The device that runs layers.
        progress: Progress output.
        until: The last stage to run.
        fresh: Make every stage again.
        max_memory: Bytes of memory that the run may use; all of the device's if None.
        ranks: The processes that share the calibration samples; None: only this one.

    Raises:
        MkaqError: Of the matching kind; earlier stages and artifacts are unchanged.
    """
    from mkaq.budget import meet_budget
    from mkaq.session import session

    budget = None
    with session(recipe, folder, device, progress, fresh, max_memory, ranks) as own:
        if recipe.budget is not None:
            recipe, budget = meet_budget(recipe, own.options, lambda tried: make(tried, own), progress)
        own.begin(recipe)
        job = make(recipe, own, until)
        return own.end(job, ship(recipe, job, own, budget) if until == LAST else None)


def make(recipe: Recipe, own: Session, until: str = LAST) -> Job:
    """Makes the models of a recipe, one stage after another, each evaluated if the recipe asks for it."""
    job = own.job(recipe)
    _measure(recipe, job, own)
    for stage in STAGES:
        section = stage.section(recipe, job.source)
        if section is not None and makes_model(stage):
            own.maker.make_model(stage, section, job)
            _measure(recipe, job, own)
        elif section is not None:
            own.maker.make(stage, section, job)
        if until == stage.NAME:
            break
    return job


def _measure(recipe: Recipe, job: Job, own: Session) -> None:
    section = evaluate.section(recipe, job.source)
    if section is not None:
        name = own.maker.make(evaluate, section, job, of=job.last)
        job.note(name, evaluate.mode(section))
        job.evaluation[job.last] = evaluate.load(job.path(name))


def ship(recipe: Recipe, job: Job, own: Session, budget: dict[str, Any] | None) -> Path:
    """Publishes the artifact: the last model, its card and its manifest."""
    from mkaq.card import model_card
    from mkaq.manifest import build_manifest

    manifest = build_manifest(recipe, job, own.source_files, budget)
    card, inputs = model_card(manifest), job.digests(job.last)
    settings = manifest.model_dump(mode="json", by_alias=True)
    return own.maker.publish_artifact(
        settings, inputs, lambda folder: export.run(job, manifest, card, folder)
    )


def stage_of(name: str) -> ModelStage:
    """The stage that made a step of a manifest."""
    return next(stage for stage in STAGES if makes_model(stage) and name == stage.NAME)
