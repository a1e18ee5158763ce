"""A run, top to bottom: calibrate -> merge -> recover -> quantize -> export, the model measured on request.

A stage reads a folder and publishes a folder; nothing else passes between stages.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import torch

from mkaq.checkpoint.resolve import resolve_model
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.digests import describe_files
from mkaq.heap import arrange_heap
from mkaq.progress import Progress
from mkaq.ranks import ALONE, Ranks
from mkaq.recipe import Recipe
from mkaq.run.budget import Trials, meet_budget, plan_budget
from mkaq.run.plan import check_resources, plan_run, remarks
from mkaq.run.publish import locked
from mkaq.run.report import write_report
from mkaq.run.result import RunResult
from mkaq.stages import Stages

Until = Literal["calibrate", "merge", "recover", "quantize", "export"]


def run(
    recipe: Recipe,
    folder: Path,
    device: torch.device,
    progress: Progress,
    *,
    until: Until = "export",
    fresh: bool = False,
    max_memory: int | None = None,
    ranks: Ranks = ALONE,
) -> RunResult:
    """Runs a recipe, skipping the stages that are there already.

    Args:
        recipe: What to do.
        folder: Of the run; holds a folder for each stage.
        device: Where layers run.
        progress: Told what happens.
        until: The last stage to run.
        fresh: Make every stage again.
        max_memory: Bytes that it may use; all that the device has if None.
        ranks: The processes that share the calibration samples.

    Raises:
        MkaqError: Of the kind that fits; earlier stages and artifacts stay as they were.
    """
    source = open_checkpoint(resolve_model(recipe.model.path, recipe.model.revision))
    for line in remarks(recipe, ranks.size):
        progress.say(line)
    options, plan = plan_budget(recipe, source, device, max_memory, ranks.size)
    check_resources(plan, folder, device, max_memory, ranks.local_size)
    arrange_heap(sparing=max_memory is not None)
    with locked(folder) if ranks.main else nullcontext():
        progress.say(f"reading {recipe.model.path}")
        for remark in source.remarks:
            progress.say(f"note: {remark}")
        files = describe_files(source.path, source.files) if ranks.main else []
        ranks.wait()

        def stages_of(settled: Recipe) -> Stages:
            sizes = plan_run(settled, source, device, max_memory, ranks.size)
            return Stages(settled, folder, device, progress, fresh, source, files, sizes, ranks)

        budget = None
        if recipe.budget is not None:

            def trial(settled: Recipe) -> RunResult:
                return _run(stages_of(settled), "quantize")

            if fresh:
                (folder / "budget.json").unlink(missing_ok=True)
            trials = Trials(folder / "budget.json", lambda tried: stages_of(tried).key(), trial, progress)
            recipe, budget = meet_budget(recipe, options, trials, progress)
        stages = stages_of(recipe)
        stages.budget = budget
        try:
            return _run(stages, until)
        finally:
            if ranks.main:
                stages.write_log()


def _run(stages: Stages, until: Until) -> RunResult:
    recipe, model = stages.recipe, stages.source
    stages.write_recipe()
    stages.evaluate("source", model)
    if recipe.needs_calibration:
        stages.calibrate()
    if recipe.merge and until != "calibrate":
        model = stages.merge()
        stages.evaluate("merge", model)
    if recipe.recover and until not in ("calibrate", "merge"):
        model = stages.recover(model)
        stages.evaluate("recover", model)
    if recipe.quantize and until in ("quantize", "export"):
        model = stages.quantize(model)
        stages.evaluate("quantize", model)
    if until == "export":
        stages.export(model)
        if stages.ranks.main:
            write_report(stages.result, stages.log)
    return stages.result
