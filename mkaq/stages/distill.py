"""The distill stage: all layers together learn what the source predicts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from mkaq.run.estimate import Estimate, ModelSize, Task
from mkaq.stages import teacher
from mkaq.stages.base import Count, Curves, Description, Made, Mode, Part, Section, Step, Table
from mkaq.stages.teacher import LearnedText, TeacherSection

if TYPE_CHECKING:
    from mkaq.checkpoint.reader import Checkpoint
    from mkaq.distill.course import Training
    from mkaq.distill.gate import Check
    from mkaq.fit.hold_out import Samples
    from mkaq.recipe import Recipe
    from mkaq.run.job import Job
    from mkaq.verify.case import Case
    from mkaq.verify.remeasure import Tolerance
    from mkaq.walk.walk import LayerWalk

NAME = "distill"
LESS = "lower recover.text.max_seq_length, or leave distill out of recover"
SOONER = "lower recover.text.num_samples or recover.epochs; or leave distill out of recover"


class AdapterSection(Section):
    """A low-rank change of every linear layer, trained in the place of its weight (LoRA)."""

    r: int = Field(default=32, ge=1, le=1024)
    """Its rank."""
    alpha: int = Field(default=64, ge=1, le=1_000_000)
    """Its scale is alpha / r."""


class DistillSection(Section):
    """Recovery by distillation: all layers learn what the source predicts, end to end.

    A model that fits on the device with its optimizer is trained at once, a larger one layer by layer, with
    the same result.
    """

    method: Literal["distill"]
    """Knowledge distillation of the whole model."""
    text: LearnedText | None = None
    """What is learned; null: the text of the calibration."""
    gate: str | None = None
    """A text file: what makes the model worse on it is not kept. Null: random phrases."""
    epochs: int = Field(default=1, ge=1, le=1000)
    """How often each sequence is learned from."""
    batch_size: int = Field(default=16, ge=1, le=65536)
    """Sequences per step."""
    learning_rate: Literal["auto"] | Annotated[float, Field(gt=0, lt=1)] = "auto"
    """AdamW's peak learning rate, falling to 0 along a cosine and halved by a measurement that is worse than
    the best one; `auto` is 0.2 / hidden_size, with an adapter 0.25 / hidden_size, and less in proportion for
    a model that has lost less than 0.15 nats per token."""
    top_k: int = Field(default=64, ge=1, le=4096)
    """Of each prediction of the source the so many likeliest tokens are learned, and the rest as one."""
    cross_entropy: float = Field(default=0.0, ge=0, le=1)
    """Weight of the loss on the text itself; the divergence from the source has the rest."""
    adapter: AdapterSection | None = None
    """Train a low-rank change of the weights, then added to them; null: all weights."""

    def how(self) -> str:
        """The method, and what is trained."""
        return f"{self.method}, {f'adapter r {self.adapter.r}' if self.adapter else 'all weights'}"

    def rate(self, hidden: int) -> float:
        """The learning rate for layers of a width."""
        if self.learning_rate != "auto":
            return self.learning_rate
        return (0.25 if self.adapter else 0.2) / hidden

    def training(self, samples: int, hidden: int, seed: int, *, together: bool) -> Training:
        """How a model of a width learns from so many sequences."""
        from mkaq.distill.adapter import Adapter
        from mkaq.distill.course import Training

        low = self.adapter
        return Training(
            self.steps(samples),
            self.batch_size,
            self.rate(hidden),
            self.learning_rate == "auto",
            self.cross_entropy,
            None if low is None else Adapter(low.r, low.alpha, seed),
            seed,
            together,
        )

    def steps(self, samples: int) -> int:
        """Steps of the whole course: a last batch that is not full is left out."""
        return self.epochs * max(1, samples // self.batch_size)


class DistillCheck(Part):
    """A measurement: KL(source || model) in nats per held-out token, all but the likeliest tokens as one."""

    step: Count
    """After how many steps."""
    loss: float | None
    """Mean loss of the steps since the last measurement; null before the first one."""
    own: float
    """On the text that is learned."""
    other: float
    """On other text: that of `gate`, or random phrases."""


class DistillRecord(Step):
    """End-to-end tuning of all layers toward what the source predicts."""

    step: Literal["distill"] = "distill"
    """Kind."""
    method: Literal["distill"] = "distill"
    """Method."""
    settings: dict[str, Any]
    """The recipe's section."""
    text: dict[str, Any]
    """What was read: the recipe's `text` with its defaults, the likeliest tokens, the gate and the seed."""
    tokens_sha256: str
    """Digest of the token ids as little-endian int32: those learned from, those held out, other text."""
    learned: Count
    """Predictions learned from, in one epoch."""
    steps: Count
    """Steps of the whole course; it may have ended earlier."""
    checks: list[DistillCheck] = Field(min_length=1)
    """The measurements; the first one before the first step."""
    best: Count
    """The number of the measurement whose weights are kept."""

    @model_validator(mode="after")
    def _best_is_measured(self) -> DistillRecord:
        if self.best >= len(self.checks):
            raise ValueError(f"best is number {self.best} of {len(self.checks)} measurements")
        return self

    def curve(self) -> list[Check]:
        """The measurements, as they were made."""
        from mkaq.distill.gate import Check

        return [Check(*(getattr(check, name) for name in Check._fields)) for check in self.checks]

    def follows(self) -> bool:
        """Trained weights do not follow from the record."""
        return False

    def fallbacks(self) -> list[str]:
        """Nothing learned is a fallback."""
        return [] if self.best else ["no weights were better on both texts: left as they were"]


Record = DistillRecord


def section(recipe: Recipe, source: Checkpoint) -> DistillSection | None:
    """The recipe's distillation."""
    return recipe.distill


def mode(section: DistillSection) -> Mode:
    """Exact, shared, and in float32."""
    return Mode(float32=True)


def inputs(section: DistillSection, job: Job) -> Mapping[str, str]:
    """What the source predicts, and the model."""
    return job.digests("source", teacher.NAME, job.last)


def estimate(section: DistillSection, before: ModelSize, task: Task) -> Estimate:
    """One layer that learns; in memory or in files, the weights and the optimizer's state of all."""
    from mkaq.run import work
    from mkaq.run.memory import distilling

    asked = section.text or LearnedText()
    wanted, length, trained = teacher.wanted_of(asked), asked.max_seq_length, _trained(section, task.source)
    held, learned = 2 * wanted.held_out * length, wanted.num_samples - wanted.held_out
    steps, batch_size = section.steps(learned), min(section.batch_size, learned)
    size = before.parameters * task.dtype.itemsize
    after = ModelSize(NAME, before.layers, before.parameters, size, section.how())
    need = distilling(task, before.layers, batch_size, length, held, trained)
    tokens = batch_size * length
    done = work.distilling(task, before.layers, steps, tokens, held, trained)
    forward = work.walking(task, before.layers, steps * tokens / task.processes)
    kept = 2 * (12 * trained * before.layers + size)
    return Estimate(need, after, done, kept, apart=forward)


def _trained(section: DistillSection, source: Checkpoint) -> int:
    """The trained weights of a layer."""
    if section.adapter is None:
        return source.count_weights(source.layer_tensor_names(0))
    return section.adapter.r * sum(sum(source.linear_shape(name)) for name in source.arch.linear_names)


def run(section: DistillSection, job: Job, folder: Path) -> Made:
    """Writes the trained checkpoint."""
    import torch

    from mkaq.calibrate.tokens import tokens_digest
    from mkaq.distill.distill import distill
    from mkaq.distill.teacher import Teacher
    from mkaq.distill.text import Text

    text = Text.load(job.path(teacher.NAME) / teacher.TEXT)
    asked = json.loads((job.path(teacher.NAME) / teacher.ASKED).read_bytes())
    walk = job.walk(job.model, dtype=torch.float32)
    hidden = walk.checkpoint.sizes.hidden
    training = section.training(text.train, hidden, job.seed, together=job.fits)
    told = Teacher(job.path(teacher.NAME), text.tokens.shape[1], asked["top_k"])
    done = distill(walk, told, text, training, folder, job.output, job.finished(NAME, folder))
    facts = {
        "text": asked,
        "tokens_sha256": tokens_digest(text.tokens),
        "learned": int(text.learned[: text.train].sum()),
        "steps": training.steps,
        "checks": [check._asdict() for check in done.checks],
        "best": done.best,
    }
    return Made(facts, done.digests)


def describe(record: DistillRecord) -> Description:
    """How much was learned, and the divergence before and after."""
    from mkaq.distill.gate import ending

    first, best, last = record.checks[0], record.checks[record.best], record.checks[-1]
    sentence = f"All layers tuned toward the predictions of the original ({best.step} steps)."
    line = (
        f"distill: {record.learned:,} predictions learned; divergence {first.own:.4f} to {best.own:.4f}, on "
        f"other text {first.other:.4f} to {best.other:.4f}; step {best.step} of {record.steps} is kept"
    )
    ended = [f"distill: ended after step {last.step}: {ending(record.curve())}"] * (last.step < record.steps)
    rows = [
        (
            f"{x.step}, kept" if x is best else str(x.step),
            "-" if x.loss is None else f"{x.loss:.4f}",
            f"{x.own:.4f}",
            f"{x.other:.4f}",
        )
        for x in record.checks
    ]
    title = "Distillation: divergence from the source in nats per held-out token"
    learned, other = "on the text learned", "on other text"
    lines = {learned: [x.own for x in record.checks], other: [x.other for x in record.checks]}
    curves = Curves([x.step for x in record.checks], lines, best.step)
    table = Table(title, ("step", "loss", learned, other), rows, curves)
    return Description(sentence, [line, *ended], [table])


def check(record: DistillRecord, case: Case) -> None:
    """The kept measurement follows from the curves; it is made again where the text is."""
    from mkaq.verify.claims import distillation_faults

    case.demand(distillation_faults(record))
    case.unknown()
    case.measure = partial(_measured_again, record, case)


def _measured_again(
    record: DistillRecord, case: Case, source: LayerWalk, walk: LayerWalk, samples: Samples, _: Tolerance
) -> Iterator[str]:
    """Yields the divergences of the kept weights that do not hold."""
    from pydantic import ValidationError

    from mkaq.calibrate.tokens import tokens_digest
    from mkaq.errors import MkaqError
    from mkaq.verify.remeasure import ROUNDED, divergences_again
    from mkaq.walk.walk import LayerWalk

    unmeasured = "divergences not measured again: the text of the distillation is not here"
    case.said = unmeasured
    try:
        asked = TeacherSection.model_validate(record.text)
        text = teacher.text_of(asked, source.checkpoint)
    except MkaqError as error:
        case.said = f"{unmeasured} ({error.where}: {error.what})"
        return
    except ValidationError:
        return
    if asked.answers == "source" or tokens_digest(text.tokens) != record.tokens_sha256:
        return
    if asked.top_k > source.checkpoint.sizes.vocabulary:
        yield f"the distillation says to learn {asked.top_k} tokens of a smaller vocabulary"
        return
    kept, learner = record.checks[record.best], LayerWalk(walk.checkpoint, walk.device)
    recorded = {"the text that was learned": (text.own, kept.own), "other text": (text.other, kept.other)}
    for what, (rows, value) in recorded.items():
        chosen = slice(rows.start, rows.stop)
        again = divergences_again(source, learner, text.tokens[chosen], text.learned[chosen], asked.top_k)
        yield from ROUNDED.faults(f"the distillation on {what}", again, value)
    case.said = f"the weights leave the divergences that the manifest says ({NAME}; {ROUNDED})"
