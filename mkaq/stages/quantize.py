"""The quantize stage: GPTQ with mkaq's own solver, or bitsandbytes through its library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from mkaq.run.estimate import Estimate, ModelSize, Task
from mkaq.stages.base import Description, Dtype, FinalNorm, Made, Mode, Part, Section, Step, Table

if TYPE_CHECKING:
    import torch

    from mkaq.checkpoint.reader import Checkpoint
    from mkaq.recipe import Recipe
    from mkaq.run.job import Job
    from mkaq.verify.case import Case

NAME = "quantize"
LESS = "quantize: {method: bitsandbytes}, which needs less than gptq"
SOONER = "lower calibration.num_samples"
GptqBits = Literal[2, 3, 4, 8]
_NAMED = 3  # modules that a line names


class GptqSection(Section):
    """GPTQ with mkaq's own solver (arXiv 2210.17323)."""

    method: Literal["gptq"]
    """Weight-only quantization that corrects its rounding errors on the calibration tokens."""
    bits: GptqBits = 4
    """Bits per weight. With a `budget`, these are the only bits tried; leave it out to try those of
    `budget.bits`."""
    group_size: Literal[-1, 16, 32, 64, 128, 256, 512, 1024] = 128
    """Number of weights per scale within a row; -1 is the whole row."""
    sym: bool = True
    """Symmetric: the zero point is the middle of the range. Most runtimes need it."""
    desc_act: bool = False
    """Quantize columns in order of descending activation, the most active first."""
    static_groups: bool = False
    """Fix the scale of every group before solving, so that a group is always `group_size` neighbouring
    columns. With `desc_act`, the checkpoint's `g_idx` is then trivial and kernels stay fast."""
    target: Literal["input", "source"] = "input"
    """The hidden states that rounding is corrected toward: those of the model being quantized (`input`, plain
    GPTQ), or those of the source model, which also repairs errors left by merging (`source`)."""
    damp_percent: float = Field(default=0.01, gt=0, lt=1)
    """Fraction of the Hessian's mean diagonal that is added to its diagonal; raised if needed."""
    lm_head: bool = False
    """Quantize the output layer too, if it is not the embedding. transformers reads it from the format
    compressed-tensors alone."""

    def config(self, dtype: torch.dtype) -> dict[str, Any]:
        """The `quantization_config` of the quantized model."""
        from mkaq.formats.gptq import quantization_config

        return quantization_config(
            bits=self.bits,
            group_size=self.group_size,
            sym=self.sym,
            scattered=self.desc_act and not self.static_groups and self.group_size != -1,
            static_groups=self.static_groups,
            damp_percent=self.damp_percent,
            lm_head=self.lm_head,
        )

    def options(self) -> dict[str, Any]:
        """The options of the solver."""
        return self.model_dump(exclude={"method", "target", "lm_head"})

    def how(self) -> str:
        """The method, its bits and its groups."""
        return f"gptq, {self.bits} bits, group_size {self.group_size}" + ", lm_head" * self.lm_head


class BitsandbytesSection(Section):
    """bitsandbytes int8 (arXiv 2208.07339) or 4-bit (arXiv 2305.14314), through its library."""

    method: Literal["bitsandbytes"]
    """Quantization without calibration."""
    bits: Literal[4, 8] = 4
    """4 (nf4 or fp4) or 8 (int8)."""
    quant_type: Literal["nf4", "fp4"] | None = None
    """The 4-bit code; by default nf4."""
    double_quant: bool | None = None
    """Also quantize the scales of the 4-bit codes (0.4 bits per weight less); on by default."""
    compute_dtype: Literal["auto"] | Dtype | None = None
    """The type in which 4-bit layers are multiplied; `auto` (the default) is the checkpoint's, but never
    float64."""

    @model_validator(mode="before")
    @classmethod
    def _four_bit_options(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        options = {"quant_type": "nf4", "double_quant": True, "compute_dtype": "auto"}
        if data.get("bits", 4) == 4:
            return {**data, **{key: value for key, value in options.items() if data.get(key) is None}}
        if given := [key for key in options if data.get(key) is not None]:
            raise ValueError(f"{', '.join(given)} only with bits: 4")
        return data

    def config(self, dtype: torch.dtype) -> dict[str, Any]:
        """The `quantization_config` of the quantized model, if its dense weights have type `dtype`."""
        from mkaq.formats.bitsandbytes import quantization_config

        if self.compute_dtype not in (None, "auto"):
            computed = str(self.compute_dtype)
        else:  # bitsandbytes multiplies no float64, and gives NaN
            computed = str(dtype).removeprefix("torch.").replace("float64", "float32")
        return quantization_config(
            bits=self.bits,
            quant_type=self.quant_type,
            double_quant=self.double_quant,
            compute_dtype=computed,
        )

    def how(self) -> str:
        """The library, and its code."""
        return f"bitsandbytes, {self.quant_type or 'int8'}"


QuantizeSection = GptqSection | BitsandbytesSection


class QuantizedModule(Part):
    """A quantized linear layer."""

    name: str
    """Its name in the model."""
    weight_error: float
    """||W - Q||^2 / ||W||^2, where W is the weight that was rounded."""
    error: float | None = None
    """||X (W - Q)^T||^2 / ||X W^T||^2 over the calibration tokens (gptq)."""
    damp_percent: float | None = None
    """The damping that was used (gptq)."""
    ridge: float | None = None
    """The ridge, if W was solved toward the source model before rounding (gptq)."""
    dead_columns: int | None = None
    """Columns with weights whose input was 0 for every calibration token: they are rounded to the nearest
    (gptq)."""
    clamped_scales: int | None = None
    """Scales at the smallest or largest number of float16, of groups with weights (gptq); rows whose weights
    are too small for float16 (bitsandbytes, 8 bits)."""
    fallback: Literal[False] = False
    """mkaq never rounds a whole layer to the nearest instead. What it could not do as asked is in the
    manifest's `fallbacks`."""


class QuantizeRecord(Step):
    """Quantization."""

    step: Literal["quantize"] = "quantize"
    """Kind."""
    method: Literal["gptq", "bitsandbytes"]
    """Method."""
    bits: int
    """Bits per weight."""
    settings: dict[str, Any]
    """The recipe's section."""
    modules: list[QuantizedModule] = Field(min_length=1)
    """Every quantized layer."""
    final_norm: FinalNorm | None = None
    """How the final norm was rescaled, if weights were solved toward the source model."""
    residuals: list[float] | None = None
    """Mean of |output - original|^2 / |original|^2 over held-out tokens after each layer, if weights do not
    follow from the source: they were fused, tuned or solved before they were quantized."""

    def modes(self) -> Mapping[str, Mode]:
        """Errors of hidden states are measured exactly, by one process."""
        return {} if self.residuals is None else {"residuals": Mode(alone=True)}

    def fallbacks(self) -> list[str]:
        """Dampings that were raised, columns without input, and scales that float16 does not hold."""
        asked = self.settings.get("damp_percent")
        damping = asked if isinstance(asked, float) else 1.0
        found = {
            "damping raised": [m.name for m in self.modules if (m.damp_percent or 0.0) > damping],
            "columns without input": [m.name for m in self.modules if m.dead_columns],
            "scales beyond float16": [m.name for m in self.modules if m.clamped_scales],
        }
        return [f"{what} in {_modules(names)}" for what, names in found.items() if names]


Record = QuantizeRecord


def _modules(names: list[str]) -> str:
    """How many modules, and the first of them."""
    some = ", ".join(names[:_NAMED]) + ", ..." * (len(names) > _NAMED)
    return f"{len(names)} module{'s' * (len(names) > 1)} ({some})"


def section(recipe: Recipe, source: Checkpoint) -> QuantizeSection | None:
    """The recipe's quantize section."""
    return recipe.quantize


def mode(section: QuantizeSection) -> Mode:
    """bitsandbytes runs in one process."""
    if isinstance(section, BitsandbytesSection):
        return Mode(alone=True)
    return Mode(fast=section.target == "input")


def inputs(section: QuantizeSection, job: Job) -> Mapping[str, str]:
    """The current model; the source and the tokens too, if the recipe has calibration."""
    beside = ("source", "calibrate") if job.has("calibrate") else ()
    return job.digests(job.last, *beside)


def estimate(section: QuantizeSection, before: ModelSize, task: Task) -> Estimate:
    """One layer, its solver's matrices, and the hidden states.

    Raises:
        UsageError: If `group_size` does not fit, or there are too few samples for `target: source`.
        UnsupportedError: If the format cannot hold a linear layer, or there is no closed form.
    """
    from mkaq.fit.targets import check_solvable
    from mkaq.formats.formats import format_of
    from mkaq.quantize.check import check_bitsandbytes, check_gptq
    from mkaq.run import work
    from mkaq.run.memory import gptq, one_layer

    source, config = task.source, section.config(task.dtype)
    shapes = source.linear_shapes()
    if isinstance(section, GptqSection):
        check_gptq(source, config)
        if section.target == "source":
            check_solvable(source, task.samples, "quantize.target: source", "target: input")
        joint = section.target == "source"
        need = gptq(task, desc_act=section.desc_act, joint=joint, head=section.lm_head)
        done = work.solving(task, before.layers, joint=joint, head=section.lm_head)
    else:
        check_bitsandbytes(source, config)
        need, done = one_layer(task), work.rounding(task, before.layers)
    every = shapes * before.layers
    if format_of(config).quantizes_head(config, source.arch.head):
        every.append(source.head_shape)
    dense = before.parameters - sum(rows * columns for rows, columns in every)
    stored = sum(format_of(config).stored_bytes(shape, config) for shape in every)
    size = dense * task.dtype.itemsize + stored
    after = ModelSize(NAME, before.layers, before.parameters, size, section.how())
    return Estimate(need, after, done, kept=size if isinstance(section, GptqSection) else 0)


def run(section: QuantizeSection, job: Job, folder: Path) -> Made:
    """Writes the quantized checkpoint; measures its errors if its weights do not follow from the source."""
    if isinstance(section, GptqSection):
        result = _gptq(section, job, folder)
    else:
        result = _bitsandbytes(section, job, folder)
    facts = {"method": section.method, "bits": section.bits, **result.facts}
    if measured(section, job) and job.ranks.is_main:
        facts["residuals"] = _residuals(job, folder)
    return Made(facts, result.digests)


def measured(section: QuantizeSection, job: Job) -> bool:
    """Whether weights do not follow from the source and the records."""
    solved = isinstance(section, GptqSection) and section.target == "source"
    return solved or not all(step.follows() for step in job.steps)


def _bitsandbytes(section: BitsandbytesSection, job: Job, folder: Path) -> Made:
    from mkaq.quantize.bnb import quantize_linear
    from mkaq.quantize.each import quantize_each

    config = section.config(job.dtype)
    done = quantize_each(job.model, config, quantize_linear, folder, job.device, job.output)
    modules, digests = done
    return Made({"modules": [asdict(module) for module in modules]}, digests)


def _gptq(section: GptqSection, job: Job, folder: Path) -> Made:
    from mkaq.fit.hold_out import calibration_samples
    from mkaq.quantize.gptq_layers import quantize_gptq
    from mkaq.quantize.joint import JointTarget

    tokens, target, beside = job.tokens(), None, None
    if section.target == "source":
        samples, beside = calibration_samples(job.ranks, tokens, job.seed), job.walk(job.source)
        tokens, target = samples.tokens, JointTarget(beside, job.groups(), samples)
    else:
        tokens = tokens[job.ranks.slice_of(len(tokens))]
    walk = job.walk(job.model, fast=mode(section).fast, beside=beside)
    config = section.config(job.dtype)
    finished = job.finished(NAME, folder)
    done = quantize_gptq(walk, tokens, section.options(), config, folder, job.output, target, finished)
    norm = done.final_norm and asdict(done.final_norm)
    return Made({"modules": [asdict(module) for module in done.modules], "final_norm": norm}, done.digests)


def _residuals(job: Job, folder: Path) -> list[float]:
    """The error of each quantized layer's output against the source."""
    from mkaq.checkpoint.validate import open_checkpoint
    from mkaq.fit.hold_out import calibration_samples
    from mkaq.fit.residuals import residuals
    from mkaq.ranks import ALONE

    samples = calibration_samples(ALONE, job.tokens(), job.seed)
    source = job.walk(job.source, ranks=ALONE)
    quantized = job.walk(open_checkpoint(folder, quantized=True), beside=source, ranks=ALONE)
    return residuals(source, quantized, job.groups(), samples.held_out_only()).layers


def describe(record: QuantizeRecord) -> Description:
    """The settings, and the module with the largest error."""
    settings = ", ".join(
        f"{key} {value}"
        for key, value in record.settings.items()
        if key not in ("method", "bits") and value is not None
    )
    worst = max(record.modules, key=lambda module: module.error or module.weight_error)
    kind, error = ("output", worst.error) if worst.error is not None else ("weight", worst.weight_error)
    line = (
        f"{record.method}, {record.bits} bits, {len(record.modules)} modules; "
        f"largest {kind} error {error:.2e} ({worst.name})"
    )
    rows = [
        (
            module.name,
            "-" if module.error is None else f"{module.error:.2e}",
            f"{module.weight_error:.2e}",
            "-" if module.damp_percent is None else str(module.damp_percent),
        )
        for module in record.modules
    ]
    title = f"Quantized layers ({record.method}, {record.bits} bits)"
    table = Table(title, ("module", "output error", "weight error", "damping"), rows)
    lines = [line, *(record.final_norm.lines() if record.final_norm else [])]
    return Description(f"Quantized with {record.method} to {record.bits} bits ({settings}).", lines, [table])


def check(record: QuantizeRecord, case: Case) -> None:
    """Weight errors are recomputed; errors of hidden states are measured again if weights were solved."""
    from mkaq.verify.claims import residual_faults
    from mkaq.verify.remeasure import residual_errors

    solved = record.settings.get("target") == "source"
    case.fault(residual_faults(record, solved or case.measure is not None))
    case.modules = {module.name: module for module in record.modules}
    if record.residuals is not None:
        errors = record.residuals
        case.measure = lambda *walks: residual_errors(errors, record.final_norm, case.groups, *walks)
    case.scale(record.final_norm)
