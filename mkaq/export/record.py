"""The manifest of a run, put together from what its stages published."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mkaq import __version__
from mkaq.calibrate.tokens import tokens_digest
from mkaq.checkpoint.hub_id import hub_id_of
from mkaq.checkpoint.reader import Checkpoint
from mkaq.digests import library_versions
from mkaq.export.manifest import (
    Budget,
    Calibration,
    FileEntry,
    Manifest,
    MeasuredGroup,
    MergeEntry,
    MergeStep,
    Module,
    NewLayer,
    QuantizeStep,
    RanOn,
    RecoveredLayer,
    RecoverStep,
    Source,
)
from mkaq.recipe import Recipe
from mkaq.run.plan import StageSize


@dataclass(frozen=True)
class Published:
    """What the stages of a run have made so far.

    Attributes:
        folder: Of the run.
        sizes: The model as it came and after each stage.
        source_files: Path, bytes and sha256 of what was read.
        tokens: Calibration token ids.
        evaluation: What was measured, by stage.
        budget: What the search for a budget tried and chose.
        ran_on: What each stage has run on.
    """

    folder: Path
    sizes: list[StageSize]
    source_files: list[dict[str, Any]]
    tokens: torch.Tensor | None
    evaluation: dict[str, Any]
    budget: dict[str, Any] | None
    ran_on: dict[str, dict[str, Any]]


def build_manifest(recipe: Recipe, source: Checkpoint, published: Published, dtype: torch.dtype) -> Manifest:
    """The manifest, complete but for the artifact's own files."""
    before_after = {
        after.stage: (before, after)
        for before, after in zip(published.sizes, published.sizes[1:], strict=False)
    }
    steps: list[MergeStep | RecoverStep | QuantizeStep] = []
    if recipe.merge is not None:
        plan = json.loads((published.folder / "merge" / "merge_plan.json").read_text())
        merge_step = MergeStep(
            dtype=str(dtype).removeprefix("torch."),
            settings=recipe.merge.model_dump(mode="json"),
            merges=[MergeEntry(**row) for row in plan["merges"]],
            measured=[MeasuredGroup(**row) for row in plan["measured"]],
            layers=[NewLayer(**row) for row in plan["layers"]],
            final_norm=plan["final_norm"],
            **_sizes(*before_after["merge"]),
        )
        steps.append(merge_step)
    if recipe.recover is not None:
        record = json.loads((published.folder / "recover" / "recovery.json").read_text())
        recover_step = RecoverStep(
            settings=recipe.recover.model_dump(mode="json"),
            layers=[RecoveredLayer(**row) for row in record["layers"]],
            final_norm=record["final_norm"],
            **_sizes(*before_after["recover"]),
        )
        steps.append(recover_step)
    if recipe.quantize is not None:
        record = json.loads((published.folder / "quantize" / "quantization.json").read_text())
        quantize_step = QuantizeStep(
            method=recipe.quantize.method,
            bits=recipe.quantize.bits,
            settings=recipe.quantize.model_dump(mode="json"),
            modules=[Module(**module) for module in record["modules"]],
            final_norm=record.get("final_norm"),
            residuals=record["residuals"],
            **_sizes(*before_after["quantize"]),
        )
        steps.append(quantize_step)
    return Manifest(
        name=recipe.name,
        mkaq_version=__version__,
        libraries=library_versions(),
        recipe=recipe.dump(),
        source=_source(recipe, source, published),
        calibration=None if published.tokens is None else _calibration(recipe, published.tokens),
        budget=None if published.budget is None else Budget(**published.budget),
        steps=steps,
        ran_on={stage: RanOn(**told) for stage, told in published.ran_on.items()},
        evaluation=published.evaluation,
        files=[],
    )


def _sizes(before: StageSize, after: StageSize) -> dict[str, int]:
    return {
        "layers_before": before.layers,
        "layers_after": after.layers,
        "parameters_before": before.parameters,
        "parameters_after": after.parameters,
        "bytes_before": before.bytes,
        "bytes_after": after.bytes,
    }


def _source(recipe: Recipe, source: Checkpoint, published: Published) -> Source:
    from_hub = source.path.parent.name == "snapshots"
    size = published.sizes[0]
    return Source(
        path=recipe.model.path,
        revision=source.path.name if from_hub else recipe.model.revision,
        base_model=recipe.model.base_model or hub_id_of(source.path, source.config),
        model_type=source.config["model_type"],
        parameters=size.parameters,
        bytes=size.bytes,
        layers=size.layers,
        files=[FileEntry(**entry) for entry in published.source_files],
    )


def _calibration(recipe: Recipe, tokens: torch.Tensor) -> Calibration:
    section = recipe.calibration
    return Calibration(
        dataset=section.dataset,
        num_samples=section.num_samples,
        max_seq_length=section.max_seq_length,
        seed=section.seed,
        tokens_sha256=tokens_digest(tokens),
    )
