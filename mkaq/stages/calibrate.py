"""The calibration tokens: chosen once, and read by every stage that fits or measures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from mkaq.run.estimate import Estimate, ModelSize, Need, Task
from mkaq.stages.base import Made, Mode, TextSection, check_length

if TYPE_CHECKING:
    from mkaq.checkpoint.reader import Checkpoint
    from mkaq.recipe import Recipe
    from mkaq.run.job import Job

NAME = "calibrate"
LESS = "use a larger machine"
SOONER = "use less text"


class CalibrationSection(TextSection):
    """The tokens on which layers are compared and quantization errors are measured."""

    num_samples: int = Field(default=128, ge=1, le=65536)
    """Number of sequences."""
    max_seq_length: int = Field(default=512, ge=8, le=131072)
    """Tokens per sequence."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the choice of sequences, and of the token positions at which layers are compared."""


def section(recipe: Recipe, source: Checkpoint) -> CalibrationSection | None:
    """The calibration section, if any stage reads the tokens."""
    return recipe.calibration if recipe.needs_calibration else None


def mode(section: CalibrationSection) -> Mode:
    """One process chooses the tokens."""
    return Mode(alone=True, plain=True)


def inputs(section: CalibrationSection, job: Job) -> Mapping[str, str]:
    """The source, which has the tokenizer, and the text."""
    from mkaq.calibrate.text import text_digest

    return {**job.digests("source"), "text": text_digest(section.dataset, section.path)}


def estimate(section: CalibrationSection, before: ModelSize, task: Task) -> Estimate:
    """Almost nothing.

    Raises:
        UsageError: If sequences are longer than the model's positions.
    """
    from mkaq.calibrate.text import check_exists

    check_exists(section.dataset, section.path, "calibration.path")
    check_length(section.max_seq_length, task.source, "calibration.max_seq_length")
    return Estimate(Need(0))


def run(section: CalibrationSection, job: Job, folder: Path) -> Made:
    """Writes the tokens that `Job.tokens` reads: input_ids, int32, shape (num_samples, max_seq_length)."""
    from safetensors.torch import save_file

    from mkaq.calibrate.text import documents
    from mkaq.calibrate.tokenizer import load_tokenizer
    from mkaq.calibrate.tokens import calibration_tokens
    from mkaq.run.job import TOKENS

    texts = documents(section.dataset, section.path, "calibrate")
    tokenizer = load_tokenizer(job.source.path)
    size = section.num_samples, section.max_seq_length
    save_file({"input_ids": calibration_tokens(texts, tokenizer, *size, section.seed)}, folder / TOKENS)
    return Made()
