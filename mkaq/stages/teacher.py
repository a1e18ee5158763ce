"""The teacher stage: what the source predicts on the text of a distillation, so that it need not be there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from mkaq.run.estimate import Estimate, ModelSize, Task
from mkaq.stages.base import Made, Mode, TextSection, check_length

if TYPE_CHECKING:
    from mkaq.checkpoint.reader import Checkpoint
    from mkaq.distill.text import Author, Text, Wanted
    from mkaq.recipe import Recipe
    from mkaq.run.job import Job

NAME = "teacher"
LESS = "lower recover.text.max_seq_length, or use a larger machine"
SOONER = "lower recover.text.num_samples"
TEXT, ASKED = "text.safetensors", "section.json"


class LearnedText(TextSection):
    """The text that a model learns to continue as the source does."""

    num_samples: int = Field(default=1024, ge=16, le=10_000_000)
    """Number of sequences; an eighth of them, and no more than 16,384 tokens, is held out to measure."""
    max_seq_length: int = Field(default=256, ge=8, le=131072)
    """Tokens per sequence."""
    answers: Literal["text", "source"] = "text"
    """What is learned: the text, and of the `messages` of a jsonl file the answers; or what the source writes
    after the first quarter of each sequence, or in the place of each conversation's last answer."""


class TeacherSection(LearnedText):
    """What the source is asked for."""

    top_k: int = Field(ge=1, le=4096)
    gate: str | None
    seed: int = Field(ge=0, lt=2**63)


def section(recipe: Recipe, source: Checkpoint) -> TeacherSection | None:
    """What the recipe's distillation needs, if it has one."""
    distill = recipe.distill
    if distill is None:
        return None
    text = distill.text or LearnedText(dataset=recipe.calibration.dataset, path=recipe.calibration.path)
    top_k = min(distill.top_k, source.sizes.vocabulary)
    asked = {"top_k": top_k, "gate": distill.gate, "seed": recipe.calibration.seed}
    return TeacherSection.model_validate({**text.model_dump(), **asked})


def mode(section: TeacherSection) -> Mode:
    """Exact, and shared."""
    return Mode()


def inputs(section: TeacherSection, job: Job) -> Mapping[str, str]:
    """The source, the text, and the text that measures."""
    from mkaq.calibrate.text import text_digest

    digests = {**job.digests("source"), "text": text_digest(section.dataset, section.path)}
    return digests | ({"gate": text_digest("text", section.gate)} if section.gate else {})


def estimate(section: TeacherSection, before: ModelSize, task: Task) -> Estimate:
    """The hidden states of all sequences, and a file of predictions.

    Raises:
        UsageError: If there is no such text, or sequences are longer than the model's positions, or it has
            conversations and the model no chat template.
    """
    from mkaq.calibrate.text import check_exists
    from mkaq.calibrate.tokenizer import load_tokenizer
    from mkaq.distill.chat import check_template, has_conversations
    from mkaq.distill.teacher import bytes_per_token
    from mkaq.run import work
    from mkaq.run.memory import teaching

    check_exists(section.dataset, section.path, "recover.text.path")
    if section.gate:
        check_exists("text", section.gate, "recover.gate")
    if section.dataset == "jsonl" and section.path and has_conversations(section.path):
        check_template(load_tokenizer(task.source.path))
    check_length(section.max_seq_length, task.source, "recover.text.max_seq_length")
    wanted, length = wanted_of(section), section.max_seq_length
    samples = wanted.num_samples + wanted.held_out
    written = samples * length * bytes_per_token(section.top_k)
    done = work.measuring(task, task.source.num_layers, samples, length)
    need = teaching(task, samples, length, section.top_k, whole=section.answers == "source")
    return Estimate(need, work=done, files=written)


def run(section: TeacherSection, job: Job, folder: Path) -> Made:
    """Writes the tokens (`TEXT`), the predictions after each of them, and the section."""
    from mkaq.distill.teacher import write_predictions
    from mkaq.files import write_json

    text = text_of(section, job.source) if section.answers == "text" else _written(section, job)
    if job.ranks.is_main:
        text.save(folder / TEXT)
        write_json(folder / ASKED, section.model_dump(mode="json"))
    write_predictions(job.walk(job.source), text.tokens, section.top_k, folder, job.progress)
    return Made()


def text_of(section: TeacherSection, source: Checkpoint, author: Author | None = None) -> Text:
    """The sequences; with an author, as it continues or answers them."""
    from mkaq.calibrate.tokenizer import load_tokenizer
    from mkaq.distill.text import build_text

    return build_text(wanted_of(section, section.seed), section.gate, load_tokenizer(source.path), author)


def _written(section: TeacherSection, job: Job) -> Text:
    """The sequences that the source wrote in the first process."""
    import torch

    from mkaq.distill.text import Text

    wanted = wanted_of(section)
    if job.ranks.is_main:
        text = text_of(section, job.source, _author(section, job))
    else:
        shape = wanted.num_samples + wanted.held_out, wanted.max_seq_length
        empty = torch.empty(shape, dtype=torch.int32), torch.empty(shape, dtype=torch.bool)
        text = Text(*empty, wanted.num_samples - wanted.held_out)
    shared = (
        job.ranks.broadcast_tensor(each.to(job.device, torch.int32)) for each in (text.tokens, text.learned)
    )
    tokens, learned = (each.cpu() for each in shared)
    return Text(tokens, learned.bool(), text.train)


def _author(section: TeacherSection, job: Job) -> Author:
    """The source, whole in memory."""
    from mkaq.calibrate.tokenizer import load_tokenizer
    from mkaq.checkpoint.end_tokens import end_tokens
    from mkaq.distill.own_words import SourceAuthor
    from mkaq.walk.device import compute_dtype
    from mkaq.walk.whole_model import whole_model

    tokenizer = load_tokenizer(job.source.path)
    model = whole_model(job.source, job.device, compute_dtype(job.source.dtype, job.device))
    end = sorted(end_tokens(job.source.path, tokenizer)) or [tokenizer.vocab_size]
    return SourceAuthor(model, tokenizer, end, section.max_seq_length, section.seed, job.progress)


def wanted_of(section: LearnedText, seed: int = 0) -> Wanted:
    """What is read."""
    from mkaq.distill.text import Wanted

    return Wanted(section.dataset, section.path, section.num_samples, section.max_seq_length, seed)
