"""A compressed model learns, all layers at once, what the source predicts on a text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from mkaq.checkpoint.finished import Finished
from mkaq.checkpoint.layout import layout_like
from mkaq.checkpoint.output import Output
from mkaq.checkpoint.side_files import copy_side_files
from mkaq.checkpoint.writer import writer_of
from mkaq.distill.course import Course, Training
from mkaq.distill.gate import Check
from mkaq.distill.learner import Learner
from mkaq.distill.student import Student
from mkaq.distill.teacher import Teacher
from mkaq.distill.text import Text
from mkaq.files import write_json
from mkaq.walk.walk import LayerWalk


class Distilled(NamedTuple):
    """The results of `distill`.

    Attributes:
        checks: The measurements on held-out tokens, the first one before the first step.
        best: The number of the one whose weights are kept.
        digests: sha256 of the weight files by name.
    """

    checks: list[Check]
    best: int
    digests: Mapping[str, str]


def distill(
    walk: LayerWalk,
    teacher: Teacher,
    text: Text,
    training: Training,
    folder: Path,
    output: Output,
    finished: Finished | None = None,
) -> Distilled:
    """Trains a model's layers and writes the checkpoint.

    Args:
        walk: A walk over the model, in float32.
        teacher: What the source predicts on the text.
        text: The text.
        training: How.
        folder: Folder of the checkpoint.
        output: How it is written.
        finished: The state in which this was stopped; gets that after each measurement.
    """
    if walk.device.type == "cpu":
        walk.use_eager_attention()
    fast = walk.ranks.has_fast_bfloat16(walk.device)
    head = walk.unembedding(torch.bfloat16 if fast else torch.float32)
    with walk.final_norm() as norm, head as logits:
        learners = [
            Learner(walk, index, training.adapter, resident=training.together)
            for index in range(walk.num_layers)
        ]
        student = Student(walk, learners, norm, logits, training.cross_entropy)
        course = Course(student, learners, teacher, text, training, output, walk, finished)
        checks, best = course.run()
    return Distilled(checks, best, _write(walk, course.kept, folder, output))


def _write(
    walk: LayerWalk, kept: Sequence[Mapping[str, torch.Tensor]], folder: Path, output: Output
) -> Mapping[str, str]:
    """Writes the checkpoint: the kept weights of every layer, the rest as it was."""
    model, dtype = walk.checkpoint, output.dtype
    layout = layout_like(model, range(model.num_layers), dtype)
    with writer_of(walk.ranks, folder, output.shard_size, layout) as writer:
        for name, tensor in model.each(model.outer_tensor_names):
            writer.add(name, tensor.to(dtype))
        for index, tensors in enumerate(kept):
            for name, tensor in tensors.items():
                writer.add(model.arch.in_layer(index, name), tensor.cpu())
            walk.activations.release()
    write_json(folder / "config.json", model.config)
    copy_side_files(model.path, folder)
    return writer.digests
