"""The merge stage: similar layers become one (MKA, arXiv 2406.16330), averaged or fused in function space."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from mkaq.run.estimate import Estimate, ModelSize, Task, Work
from mkaq.stages import analyze
from mkaq.stages.analyze import ManifoldSection, MeasuredGroup
from mkaq.stages.base import Description, FinalNorm, Made, Mode, Row, Section, Step, Table
from mkaq.stages.merge_parts import MergeEntry, NewLayer

if TYPE_CHECKING:
    from mkaq.arch.arch import Arch
    from mkaq.checkpoint.reader import Checkpoint
    from mkaq.recipe import Recipe
    from mkaq.run.job import Job
    from mkaq.verify.case import Case

NAME = "merge"
LESS = "merge.fuse: average, which needs less than channels"
SOONER = "lower calibration.num_samples, or merge.fuse: average"
_INSTEAD = "fuse: average, with recover: {method: layerwise}"


class ProtectSection(Section):
    """Layers that are never merged."""

    first: int = Field(default=1, ge=0)
    """Number of layers at the start."""
    last: int = Field(default=1, ge=0)
    """Number of layers at the end."""

    def both(self) -> tuple[int, int]:
        """`first` and `last`."""
        return self.first, self.last


class MergeSection(Section):
    """Layer merging with MKA (arXiv 2406.16330)."""

    method: Literal["mka"] = "mka"
    """The merging method."""
    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Fraction of the layers to remove, rounded to whole layers; or give `layers`, or a `budget`."""
    layers: Annotated[int, Field(ge=1)] | None = None
    """Number of layers to remove; or give `ratio`."""
    order: Literal["similarity", "back_to_front", "measured"] = "measured"
    """`measured` tries every group of neighbours and takes the cheapest partition of the model; `similarity`
    merges the most similar neighbours first; `back_to_front` is the paper's order."""
    fuse: Literal["channels", "average"] | None = None
    """`channels` keeps the attention heads and MLP channels that matter and solves what they write, to
    restore the original hidden states; `average` is the paper's weighted mean of every tensor. Null:
    `channels` if the family allows it and no coefficient is given, else `average`."""
    coefficient: Literal["similarity", "sigmoid", "measured"] | Annotated[float, Field(ge=0, le=1)] | None = (
        None
    )
    """Weight of the earlier layer in an average: a number; `measured`, the value from 0.5 to 1 whose hidden
    states are closest to the original (the default); `similarity`, the NPIB; `sigmoid`, its sigmoid (the
    published script). Null with `fuse: channels`, which has no such weight."""
    manifold: ManifoldSection | None = None
    """How layers are compared. Null if nothing compares them: with `order: measured`, unless the coefficient
    is `similarity` or `sigmoid`."""
    protect: ProtectSection = ProtectSection()
    """Layers left alone."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        """Fills in the coefficient and the manifold, but only where they are read."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        if data.get("coefficient") is not None and data.get("fuse") is None:
            data["fuse"] = "average"
        if data.get("fuse") == "average" and data.get("coefficient") is None:
            data["coefficient"] = "measured"
        compared = data.get("coefficient") in ("similarity", "sigmoid")
        if data.get("manifold") is None and (data.get("order", "measured") != "measured" or compared):
            data["manifold"] = {}
        return data

    @model_validator(mode="after")
    def _obeyed(self) -> MergeSection:
        if self.ratio is not None and self.layers is not None:
            raise ValueError("give either ratio or layers (`null` takes one away)")
        if self.fuse == "channels" and self.coefficient is not None:
            raise ValueError("coefficient is read with fuse: average only; leave it out")
        compared = self.order != "measured" or self.coefficient in ("similarity", "sigmoid")
        if self.manifold is not None and not compared:
            raise ValueError(
                "manifold is read with order: similarity or back_to_front, or an average by coefficient: "
                "similarity or sigmoid; leave it out"
            )
        return self

    def fitted(self, arch: Arch) -> MergeSection:
        """This section with the `fuse` that a family allows, if it names none."""
        from mkaq.fit.targets import unsolvable

        if self.fuse is not None:
            return self
        given = self.model_dump(exclude_none=True)
        return MergeSection.model_validate(given | {"fuse": "average" if unsolvable(arch) else "channels"})

    def how(self) -> str:
        """How layers are merged, and chosen."""
        return f"{self.fuse}, {self.order}"

    def removed(self, num_layers: int) -> int:
        """The number of layers to remove from a model of `num_layers`.

        Raises:
            UsageError: If that leaves nothing to merge, or more than can be merged.
        """
        from mkaq.merge.groups import layers_to_remove

        return layers_to_remove(num_layers, self.ratio, self.layers, self.protect.both())


class MergeRecord(Step):
    """Layer merging."""

    step: Literal["merge"] = "merge"
    """Kind."""
    method: Literal["mka"] = "mka"
    """Method."""
    dtype: Literal["float64", "float32", "bfloat16", "float16"]
    """Type of the merged tensors."""
    settings: dict[str, Any]
    """The recipe's section: order, coefficient, manifold, bins, bias correction."""
    merges: list[MergeEntry]
    """The merges of averages, in the order in which they were chosen."""
    measured: list[MeasuredGroup] = Field(default=[])
    """Every measured group (order: measured)."""
    held_out: bool = True
    """Whether groups were measured on samples that they were not built from; not with too few samples."""
    layers: list[NewLayer] = Field(min_length=1)
    """Every layer of the result."""
    final_norm: FinalNorm | None = None
    """How the final norm was rescaled, if it was."""

    @property
    def fused(self) -> bool:
        """Whether layers were fused."""
        return any(layer.fused for layer in self.layers)

    def follows(self) -> bool:
        """True for averages; solved weights do not follow from the record."""
        return not self.fused

    def fallbacks(self) -> list[str]:
        """Groups that were not measured on held-out samples."""
        return [] if self.held_out else ["groups measured on the samples they were built from, all there are"]

    def proofs(self) -> Sequence[str]:
        """The file of origins, if layers were fused."""
        return ["mkaq-origins.json"] if self.fused else []

    def groups(self) -> list[list[int]]:
        """For each layer, the source layers that it replaces."""
        return [sorted(layer.weights) for layer in self.layers]


Record = MergeRecord


def section(recipe: Recipe, source: Checkpoint) -> MergeSection | None:
    """The recipe's merge section."""
    return recipe.merge


def mode(section: MergeSection) -> Mode:
    """Averages use fast walks: their choices do not need the last digits."""
    return Mode(fast=section.fuse == "average")


def inputs(section: MergeSection, job: Job) -> Mapping[str, str]:
    """The source, the tokens and the analysis."""
    return job.digests("source", "calibrate", "analyze")


def estimate(section: MergeSection, before: ModelSize, task: Task) -> Estimate:
    """The largest group in memory.

    Raises:
        UsageError: If that many layers cannot be removed, or there are too few samples.
        UnsupportedError: If the model cannot lose layers, or has no closed form.
    """
    from mkaq.arch.config import keep_layers
    from mkaq.fit.targets import check_solvable
    from mkaq.merge.segment import longest_group
    from mkaq.run import work
    from mkaq.run.memory import merging

    assert section.fuse is not None, "the recipe is fitted to the family first"
    source, removed = task.source, section.removed(before.layers)
    left, free = before.layers - removed, before.layers - sum(section.protect.both())
    keep_layers(source.config, source.hf_config.to_dict(), range(left), source.path / "config.json")
    if section.fuse == "channels":
        check_solvable(source, task.samples, "merge.fuse: channels", _INSTEAD)
    parameters = before.parameters - removed * source.count_weights(source.layer_tensor_names(0))
    size = parameters * task.dtype.itemsize
    need = merging(task, section.fuse, longest_group(free, removed), section.coefficient == "measured")
    if section.fuse == "channels":
        done = work.fusing(task, left)
    else:
        done = work.averaged(task, left) if section.coefficient == "measured" else Work()
    kept = size if section.fuse == "channels" else 0
    return Estimate(need, ModelSize(NAME, left, parameters, size, section.how()), done, kept)


def run(section: MergeSection, job: Job, folder: Path) -> Made:
    """Writes the merged checkpoint, and the origins of heads and channels if layers were fused."""
    from mkaq.fit.hold_out import calibration_samples
    from mkaq.merge.averaged import averaged_layers
    from mkaq.merge.choose import choose
    from mkaq.merge.cost import holds_out
    from mkaq.merge.fused import Streams, fused_layers
    from mkaq.merge.origins import ORIGINS, write_origins
    from mkaq.merge.write import write_merged

    source, walk = job.source, job.walk(job.source, fast=mode(section).fast)
    analysis = analyze.load(job.path("analyze"))
    samples = calibration_samples(job.ranks, job.tokens(), job.seed)
    removed = section.removed(walk.num_layers)
    rules = removed, section.order, section.coefficient, section.protect.both()
    plan = choose(analysis, walk, samples, *rules, job.progress)
    if section.fuse == "channels":
        streams = Streams.of(walk, samples)
        finished = job.finished(NAME, folder)
        built = fused_layers(streams, plan.groups, job.dtype, finished)
        merges, final_norm = [], streams.rescale
    else:
        built, merges, final_norm = averaged_layers(source, plan, job.dtype), plan.as_json()["merges"], None
    layers = job.progress.track(built, "merge", len(plan.layers))
    written = write_merged(source, layers, plan.kept, folder, job.output, job.ranks, final_norm)
    if written.origins:
        write_origins(folder / ORIGINS, written.origins)
    facts = {
        "dtype": str(job.dtype).removeprefix("torch."),
        "merges": merges,
        "measured": analyze.rows(analysis.costs),
        "held_out": not analysis.costs or holds_out(len(job.tokens()), len(analysis.costs)),
        "layers": written.rows,
        "final_norm": written.final_norm and asdict(written.final_norm),
    }
    return Made(facts, written.digests)


def describe(record: MergeRecord) -> Description:
    """The merged groups, and the remaining errors."""
    groups = [", ".join(layer.from_) for layer in record.layers if len(layer.from_) > 1]
    how = "fused in function space" if record.layers[0].fused else "averaged"
    how += f") from {record.layers_before} to {record.layers_after} layers"
    sentence = f"Merged (MKA, arXiv 2406.16330; {how}: {'; '.join(groups)}."
    return Description(sentence, list(_lines(record)), list(_tables(record)))


def _lines(record: MergeRecord) -> Iterator[str]:
    yield from (layer.line() for layer in record.layers if len(layer.from_) > 1)
    if fused := [layer.fused for layer in record.layers if layer.fused]:
        solved = sum(f.attention.ridge is not None or f.mlp.ridge is not None for f in fused)
        summary = f"{solved} of {len(fused)} layers solved toward the original hidden states"
        yield f"{summary}; error at the end {fused[-1].residual:.4f}"
    yield from record.final_norm.lines() if record.final_norm else ()


def _tables(record: MergeRecord) -> Iterator[Table]:
    if record.merges:
        header: Row = ("into", "from", "coefficient", "similarity")
        yield Table("Merges", header, [merge.row() for merge in record.merges])
    if record.measured:
        header = ("layers", "divergence when merged alone, nats")
        yield Table("Groups measured", header, [group.row() for group in record.measured])
    if record.fused:
        header = ("layer", "channels from", "o_proj ridge", "error", "down_proj ridge", "error", "output")
        yield Table("Fused layers", header, [layer.row() for layer in record.layers if layer.fused])


def check(record: MergeRecord, case: Case) -> None:
    """Averaged layers are recomputed entirely; fused layers except for `o_proj` and `down_proj`."""
    from mkaq.dtypes import dtype_named
    from mkaq.merge.origins import ORIGINS, read_origins
    from mkaq.verify.claims import origin_faults, plan_faults
    from mkaq.verify.known import averaged, fused
    from mkaq.verify.remeasure import merge_faults

    dtype = dtype_named(record.dtype)
    if record.fused:
        origins = read_origins(case.artifact.path / ORIGINS)
        case.demand(origin_faults(record, origins, case.source))
        known = fused(record.layers, origins, case.source, dtype)
        case.measure = lambda *walks: merge_faults(record, *walks)
    else:
        case.demand(plan_faults(record, case.source))
        known = averaged(record.layers, case.source, dtype)
    what = "layers but for what was solved" if record.fused else "layers"
    case.merged(known, record.groups(), dtype, f"{len(record.layers)} {what}")
    case.scale(record.final_norm)
