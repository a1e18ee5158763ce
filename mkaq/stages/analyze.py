"""The measurements for merging: the similarity of layers, and the cost of merging each group of layers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from mkaq.run.estimate import Estimate, ModelSize, Task, Work
from mkaq.stages.base import Made, Mode, Part, Row, Section

if TYPE_CHECKING:
    from mkaq.checkpoint.reader import Checkpoint
    from mkaq.merge.choose import Analysis
    from mkaq.recipe import Recipe
    from mkaq.run.job import Job

NAME = "analyze"
LESS = "lower merge.manifold.points or calibration.num_samples"
SOONER = "order: similarity compares layers alone; or lower calibration.num_samples"
SIMILARITY, COSTS = "similarity.safetensors", "costs.json"


class ManifoldSection(Section):
    """The diffusion map of a layer's hidden states, and the bins that estimate its entropy."""

    dimensions: int = Field(default=2, ge=1, le=4)
    """Number of diffusion coordinates."""
    points: int = Field(default=1024, ge=64, le=16384)
    """Largest number of token positions at which hidden states are compared; the calibration may have
    fewer."""
    bandwidth: Literal["median"] | Annotated[float, Field(gt=0)] = "median"
    """Width of the Gaussian kernel: a number, or the median pairwise distance."""
    alpha: float = Field(default=0.5, ge=0, le=1)
    """Density normalization: 0 none (graph Laplacian), 0.5 Fokker-Planck, 1 Laplace-Beltrami."""
    time: float = Field(default=1, ge=0, le=100)
    """Diffusion time: the exponent of the eigenvalues that scale the coordinates."""
    bins: int = Field(default=4, ge=2, le=32)
    """Equal-frequency bins per coordinate."""
    bias_correction: Literal["miller_madow", "none"] = "miller_madow"
    """Correction of the plug-in entropies for the finite number of points."""


class AnalysisSection(Section):
    """The settings of the merge section that an analysis depends on; other ratios can share the analysis."""

    manifold: ManifoldSection | None
    """How layers are compared; null: they are not."""
    fuse: Literal["average", "channels"]
    """How groups are merged to measure them."""
    coefficient: float | None
    """Coefficient of averages; null: the best one of each group."""
    candidates: list[tuple[int, int]] = Field(strict=False)
    """First layer and length of every group to measure."""


class MeasuredGroup(Part):
    """A group of neighbouring layers that was measured."""

    first: int
    """Its first layer."""
    layers: int
    """Its number of layers."""
    error: float
    """Cost of merging it alone: mean KL divergence of the next-token distributions from the source's over
    held-out tokens, in nats."""

    def row(self) -> Row:
        """The group's row in the report."""
        return (f"{self.first} - {self.first + self.layers - 1}", f"{self.error:.4f}")


def section(recipe: Recipe, source: Checkpoint) -> AnalysisSection | None:
    """The settings that the analysis needs; None without merging."""
    from mkaq.merge.segment import candidate_groups

    merge = recipe.merge
    if merge is None:
        return None
    assert merge.fuse is not None, "the recipe is fitted to the family first"
    candidates: list[tuple[int, int]] = []
    if merge.order == "measured":
        layers = source.num_layers
        candidates = candidate_groups(layers, merge.protect.both(), merge.removed(layers))
    fixed = merge.coefficient if isinstance(merge.coefficient, float) and candidates else None
    return AnalysisSection(manifold=merge.manifold, fuse=merge.fuse, coefficient=fixed, candidates=candidates)


def mode(section: AnalysisSection) -> Mode:
    """Averages are measured in fast walks."""
    return Mode(fast=section.fuse == "average")


def inputs(section: AnalysisSection, job: Job) -> Mapping[str, str]:
    """The source and the calibration tokens."""
    return job.digests("source", "calibrate")


def estimate(section: AnalysisSection, before: ModelSize, task: Task) -> Estimate:
    """Hidden states at the points, and the outputs of each candidate."""
    from mkaq.run import work
    from mkaq.run.memory import analyzing

    points = section.manifold.points if section.manifold else 0
    done = work.comparing(task, points, fast=mode(section).fast) if points else Work()
    fuse, measured = section.fuse == "channels", section.coefficient is None
    done += work.trying(task, section.candidates, fuse=fuse, measured=measured)
    need, count = analyzing(task, points, section.fuse, section.candidates), len(section.candidates)
    probed = work.trial_tokens(task, count)[1] * task.processes if count else 0
    return Estimate(need, work=done, kept=4 * count * probed * task.source.sizes.hidden)


def run(section: AnalysisSection, job: Job, folder: Path) -> Made:
    """Writes `SIMILARITY` (npib, coordinates) and `COSTS`, each if the section needs it."""
    from safetensors.numpy import save_file

    from mkaq.files import write_json
    from mkaq.merge.compare import compare_layers
    from mkaq.merge.cost import by_average, by_channels, measure_groups

    walk, tokens = job.walk(job.source, fast=mode(section).fast), job.tokens()
    if section.manifold is not None:
        similarity = compare_layers(walk, tokens, job.seed, job.progress, **section.manifold.model_dump())
        arrays = {"npib": similarity.matrix, "coordinates": similarity.coordinates}
        save_file(arrays, folder / SIMILARITY)
    if section.candidates:
        average = section.fuse == "average"
        build = by_average(walk, section.coefficient) if average else by_channels(walk, job.dtype)
        finished = job.finished(NAME, folder)
        costs = measure_groups(walk, tokens, job.seed, section.candidates, build, job.progress, finished)
        write_json(folder / COSTS, rows(costs))
    return Made()


def rows(costs: Mapping[tuple[int, int], float]) -> list[dict[str, Any]]:
    """Measured groups as plain data."""
    return [{"first": first, "layers": layers, "error": error} for (first, layers), error in costs.items()]


def load(folder: Path) -> Analysis:
    """Reads the files that `run` wrote."""
    from safetensors.numpy import load_file

    from mkaq.merge.choose import Analysis

    similarity = load_file(folder / SIMILARITY)["npib"] if (folder / SIMILARITY).is_file() else None
    costs = json.loads((folder / COSTS).read_text()) if (folder / COSTS).is_file() else []
    return Analysis(similarity, {(row["first"], row["layers"]): row["error"] for row in costs})
