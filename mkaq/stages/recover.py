"""The recover stage: every layer is tuned alone toward the original hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from mkaq.run.estimate import Estimate, ModelSize, Task
from mkaq.stages.base import Description, Made, Mode, Part, Section, Step, Table

if TYPE_CHECKING:
    from mkaq.checkpoint.reader import Checkpoint
    from mkaq.recipe import Recipe
    from mkaq.run.job import Job
    from mkaq.verify.case import Case

NAME = "recover"
LESS = "lower recover.batch_size or calibration.max_seq_length, or leave recover out"
SOONER = "lower recover.steps, or calibration.max_seq_length; or leave recover out (recover: null)"


class LayerwiseSection(Section):
    """Recovery without the whole model in memory: every layer is tuned alone toward the original hidden
    states.
    """

    method: Literal["layerwise"]
    """Knowledge distillation, layer by layer."""
    steps: int = Field(default=100, ge=1, le=100_000)
    """Optimizer steps per layer. Then at most 48 tune the last layer toward the source's predictions."""
    learning_rate: Literal["auto"] | Annotated[float, Field(gt=0, lt=1)] = "auto"
    """AdamW's peak learning rate, falling to 0 along a cosine; `auto` is 0.25 / hidden_size."""
    batch_size: int = Field(default=32, ge=1, le=4096)
    """Largest number of sequences per step; the calibration may have fewer."""

    def how(self) -> str:
        """The method, and its steps."""
        return f"{self.method}, {self.steps} steps"


class RecoveredLayer(Part):
    """A tuned layer; errors are the mean of |output - original|^2 / |original|^2 over held-out tokens."""

    new: int
    """Its number."""
    error_before: float
    """Error with the merged weights, given the tuned layers before it."""
    error: float
    """Error with the final weights."""
    steps: int
    """The step with the lowest held-out error; the last layer's: plus those toward predictions.
    0: the weights are those of the merge."""


class RecoverRecord(Step):
    """Layer-by-layer tuning toward the hidden states of the source; the last one toward its predictions."""

    step: Literal["recover"] = "recover"
    """Kind."""
    method: Literal["layerwise"] = "layerwise"
    """Method."""
    settings: dict[str, Any]
    """The recipe's section."""
    layers: list[RecoveredLayer] = Field(min_length=1)
    """Every layer."""
    divergence_before: float
    """KL(source || model) in nats per held-out token, before the last layer was tuned toward it."""
    divergence: float
    """The same after."""

    @field_validator("settings")
    @classmethod
    def _has_steps(cls, value: dict[str, Any]) -> dict[str, Any]:
        if "steps" not in value:
            raise ValueError("lacks the number of steps")
        return value

    def follows(self) -> bool:
        """Tuned weights do not follow from the record."""
        return False


Record = RecoverRecord


def section(recipe: Recipe, source: Checkpoint) -> LayerwiseSection | None:
    """The recipe's recover section."""
    return recipe.layerwise


def mode(section: LayerwiseSection) -> Mode:
    """Exact, and shared."""
    return Mode()


def inputs(section: LayerwiseSection, job: Job) -> Mapping[str, str]:
    """The source, the tokens, and the merged model."""
    return job.digests("source", "calibrate", "merge")


def estimate(section: LayerwiseSection, before: ModelSize, task: Task) -> Estimate:
    """One layer with its optimizer, and two streams of hidden states.

    Raises:
        UsageError: If there is no sample to learn from beside the held-out one.
    """
    from mkaq.errors import UsageError
    from mkaq.run import work
    from mkaq.run.memory import tuning

    if task.samples < 2:
        raise UsageError(
            "one sample is too few to tune on some and measure on others",
            where="calibration.num_samples",
            fix="use at least 2, better 128 or more; or recover: null",
        )
    size = before.parameters * task.dtype.itemsize
    after = ModelSize(NAME, before.layers, before.parameters, size, section.how())
    done = work.tuning(task, before.layers, section.steps, section.batch_size)
    return Estimate(tuning(task, section.batch_size), after, done, kept=size)


def run(section: LayerwiseSection, job: Job, folder: Path) -> Made:
    """Writes the tuned checkpoint."""
    from mkaq.fit.hold_out import calibration_samples
    from mkaq.recover.layerwise import recover
    from mkaq.recover.steps import Tuning

    samples = calibration_samples(job.ranks, job.tokens(), job.seed)
    source = job.walk(job.source)
    walk = job.walk(job.model, beside=source)
    tuning = Tuning(section.steps, section.learning_rate, section.batch_size, job.seed)
    finished = job.finished(NAME, folder)
    done = recover(source, walk, job.groups(), samples, tuning, folder, job.output, finished)
    layers = [asdict(layer) for layer in done.layers]
    facts = {"layers": layers, "divergence_before": done.divergence_before, "divergence": done.divergence}
    return Made(facts, done.digests)


def describe(record: RecoverRecord) -> Description:
    """The number of tuned layers, and the remaining error."""
    sentence = (
        "Every layer tuned alone toward the hidden states of the original "
        f"({record.settings['steps']} steps)."
    )
    tuned, last = sum(layer.steps > 0 for layer in record.layers), record.layers[-1]
    line = f"recover: {tuned} of {len(record.layers)} layers tuned; error at the end {last.error:.4f}"
    rows = [
        (str(x.new), f"{x.error_before:.4f}", f"{x.error:.4f}", str(x.steps or "kept as it was"))
        for x in record.layers
    ]
    table = Table("Recovered layers", ("layer", "error before", "error", "best step"), rows)
    end = f"last layer: divergence {record.divergence_before:.4f} to {record.divergence:.4f}"
    return Description(sentence, [line, end], [table])


def check(record: RecoverRecord, case: Case) -> None:
    """The errors of the tuned weights are measured again."""
    from mkaq.verify.claims import recovery_faults
    from mkaq.verify.remeasure import residual_errors

    case.demand(recovery_faults(record, len(case.groups)))
    case.unknown()
    errors = [layer.error for layer in record.layers]
    case.measure = lambda *walks: residual_errors(errors, None, case.groups, *walks)
