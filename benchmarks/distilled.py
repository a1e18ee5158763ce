"""Distillation in the benchmarks of quality: every model learns from the same text and the same source."""

import argparse
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality_text import calibration_of
from mkaq.checkpoint.output import Output
from mkaq.digests import digest_of
from mkaq.distill.course import Training
from mkaq.distill.distill import distill
from mkaq.distill.teacher import Teacher, write_predictions
from mkaq.distill.text import Text, Wanted, with_other
from mkaq.files import write_json
from mkaq.fit.shuffle import probing_tokens
from mkaq.progress import Progress
from mkaq.stages.distill import DistillSection
from mkaq.walk.walk import LayerWalk

DISTILL = "+distill"
CONTROL = "dense+distill"
LEARNED = ("channels+layerwise+distill", "sleb+distill", CONTROL)


@dataclass(frozen=True)
class Lessons:
    """What is learned, and how.

    Attributes:
        text: The sequences.
        section: The recipe's keys; those of its text are not read.
        hidden: The width of the models.
    """

    text: Text
    section: DistillSection
    hidden: int

    @cached_property
    def name(self) -> str:
        """What the source says, and a digest of how it is learned."""
        return f"{self.said}-{digest_of(repr(self._training))[:8]}"

    @cached_property
    def said(self) -> str:
        """The tokens that are learned from, and a digest of all that the source's predictions depend on."""
        size = self.text.train * self.text.tokens.shape[1]
        return f"{size}-{digest_of([self.text.tokens.tolist(), self.section.top_k])[:8]}"

    @property
    def _training(self) -> Training:
        return self.section.training(self.text.train, self.hidden, 0, together=True)

    def teach(self, source: LayerWalk, folder: Path) -> float:
        """Writes the source's predictions, unless they are there; returns the seconds that it took."""
        if not folder.exists():
            scratch = folder.with_name(f".{folder.name}")
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            began = time.perf_counter()
            write_predictions(source, self.text.tokens, self.section.top_k, scratch, Progress())
            write_json(scratch / "made.json", {"seconds": time.perf_counter() - began})
            scratch.rename(folder)
        return float(json.loads((folder / "made.json").read_text())["seconds"])

    def learn(self, model: LayerWalk, teacher: Path, folder: Path, output: Output) -> list[dict[str, Any]]:
        """Writes a model, a walk in float32 over it, that has learned; returns the measurements."""
        told = Teacher(teacher, self.text.tokens.shape[1], self.section.top_k)
        done = distill(model, told, self.text, self._training, folder, output)
        return [check._asdict() for check in done.checks]


def add_arguments(add: Callable[..., Any]) -> None:
    """Adds the options of `lessons_of` to a command line."""
    what = "what distillation learns ('': what Python carries), of several as much from each; none if absent"
    add("--distill-text", metavar="FILE", action="append", default=[], help=what)
    add("--distill-samples", type=int, default=8192, help="sequences of it, as long as those of calibration")
    add("--distill-batch", type=int, default=16, help="sequences per step")
    add("--distill-epochs", type=int, default=1, help="how often each sequence is learned from")


def lessons_of(options: argparse.Namespace, tokenizer: Any, hidden: int) -> Lessons | None:
    """What the options of `add_arguments` say; without it, the methods that learn are left out of them."""
    if not options.distill_text:
        options.methods = [name for name in options.methods if name not in LEARNED]
        return None
    wanted = Wanted("text", None, options.distill_samples, options.max_seq_length, 0)
    held = wanted.held_out
    tokens = calibration_of(options.distill_text, tokenizer, wanted.num_samples, wanted.max_seq_length)
    other = probing_tokens(tokens[-held:], 0)[held:]
    text = with_other(tokens, torch.ones_like(tokens, dtype=torch.bool), other)
    course = {"batch_size": options.distill_batch, "epochs": options.distill_epochs}
    return Lessons(text, DistillSection(method="distill", **course), hidden)
