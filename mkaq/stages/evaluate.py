"""Measurements of the source and of the model after each stage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from mkaq.run.estimate import Estimate, ModelSize, Task
from mkaq.stages.base import Made, Mode, Section, TextSection

if TYPE_CHECKING:
    from mkaq.checkpoint.reader import Checkpoint
    from mkaq.recipe import Recipe
    from mkaq.run.job import Job

NAME = "evaluate"
LESS = "lower evaluate.perplexity.max_seq_length or num_samples, or leave it out"
SOONER = "lower evaluate.perplexity.num_samples"
EVALUATION = "evaluation.json"


class PerplexitySection(TextSection):
    """Perplexity per token over consecutive sequences of a text."""

    num_samples: Annotated[int, Field(ge=1)] | None = None
    """Largest number of sequences; null reads the whole text."""
    max_seq_length: int = Field(default=512, ge=8, le=131072)
    """Tokens per sequence."""


class EvaluateSection(Section):
    """Measurements of the source and of the model after each stage."""

    perplexity: PerplexitySection | None = None
    """Perplexity, or null."""
    limit: Annotated[float, Field(ge=1)] | None = None
    """Largest perplexity of the model after each stage, as a ratio to the source's, e.g. 2.0. Beyond it the
    run ends with exit code 5, and makes no artifact. Null: any."""

    @model_validator(mode="after")
    def _limits_something(self) -> EvaluateSection:
        if self.limit is not None and self.perplexity is None:
            raise ValueError("limit is read with perplexity only; leave it out")
        return self


def section(recipe: Recipe, source: Checkpoint) -> PerplexitySection | None:
    """The recipe's perplexity section."""
    return recipe.evaluate.perplexity if recipe.evaluate else None


def mode(section: PerplexitySection) -> Mode:
    """Exact, and shared."""
    return Mode()


def inputs(section: PerplexitySection, job: Job) -> Mapping[str, str]:
    """The model and the text."""
    from mkaq.calibrate.text import text_digest

    return {**job.digests(job.last), "text": text_digest(section.dataset, section.path)}


def estimate(section: PerplexitySection, before: ModelSize, task: Task) -> Estimate:
    """The hidden states of all sequences, and the logits of one."""
    from mkaq.calibrate.text import check_exists
    from mkaq.run import work
    from mkaq.run.memory import measuring

    check_exists(section.dataset, section.path, "evaluate.perplexity.path")
    size = section.num_samples, section.max_seq_length
    return Estimate(measuring(task, *size), work=work.measuring(task, before.layers, *size))


def run(section: PerplexitySection, job: Job, folder: Path) -> Made:
    """Writes `EVALUATION`."""
    from mkaq.calibrate.text import documents
    from mkaq.calibrate.tokenizer import load_tokenizer
    from mkaq.calibrate.tokens import evaluation_sequences
    from mkaq.evaluate.perplexity import perplexity
    from mkaq.files import write_json

    texts = documents(section.dataset, section.path, "evaluate")
    tokenizer = load_tokenizer(job.source.path)
    sequences = evaluation_sequences(texts, tokenizer, section.max_seq_length, section.num_samples)
    measured = perplexity(job.walk(job.model), sequences, job.progress, f"perplexity of {job.last}")
    settings = section.model_dump(mode="json")
    write_json(folder / EVALUATION, {"perplexity": {**measured.as_json(), "settings": settings}})
    return Made()


def load(folder: Path) -> dict[str, Any]:
    """Reads the file that `run` wrote."""
    evaluation: dict[str, Any] = json.loads((folder / EVALUATION).read_text())
    return evaluation
