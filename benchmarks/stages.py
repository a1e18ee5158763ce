"""Stages outside of a run, on given calibration tokens: what they write is published nowhere."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

from mkaq.checkpoint.output import Output
from mkaq.checkpoint.reader import Checkpoint
from mkaq.progress import Progress
from mkaq.ranks import ALONE
from mkaq.recipe import Recipe
from mkaq.run.job import TOKENS, Job
from mkaq.stages import analyze, merge
from mkaq.stages.base import Made

SHARD_SIZE = 4 * 10**9


def merged(
    source: Checkpoint,
    tokens: torch.Tensor,
    settings: Mapping[str, Any],
    folder: Path,
    device: torch.device,
    progress: Progress | None = None,
) -> Made:
    """Analyzes and merges a model, as a run does it.

    Args:
        source: The model.
        tokens: Calibration token ids, shape (samples, length).
        settings: The recipe's merge section.
        folder: Where the merged checkpoint goes; made if it is not there.
        device: Where layers run.
        progress: Told of every layer.

    Returns:
        What merging tells beside its files.
    """
    model = {"path": str(source.path)}
    recipe = Recipe.model_validate({"version": 1, "name": "benchmark", "model": model, "merge": settings})
    recipe = recipe.fitted(source.arch)
    compared = analyze.section(recipe, source)
    assert recipe.merge is not None and compared is not None
    folder.mkdir(exist_ok=True)
    with TemporaryDirectory() as scratch:
        output = Output(source.dtype, SHARD_SIZE, progress or Progress(quiet=True))
        job = Job(source, "", output, 0, device, ALONE, "device", Path(scratch))
        save_file({"input_ids": tokens}, Path(scratch, TOKENS))
        job.publish("calibrate", Path(scratch), "")
        analyze.run(compared, job, Path(scratch))
        job.publish("analyze", Path(scratch), "")
        return merge.run(recipe.merge, job, folder)
