"""One step of a distillation, one layer at a time, with everything else in files: its time and peak memory.

usage: python -m benchmarks.distill_step SHAPE --layers 3 [--samples 16] [--length 256] [--steps 1]

SHAPE is one of benchmarks/shapes.py (random weights are written to a scratch folder) or a model's folder.
Prints JSON. The time of a step is proportional to the number of layers, but for the head's share; memory does
not depend on it.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.machine import command_line, machine
from benchmarks.shapes import CONFIGS, write_checkpoint
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.distill.learner import Learner
from mkaq.distill.loss import Predictions
from mkaq.distill.student import Lesson, Student
from mkaq.heap import arrange_heap
from mkaq.peak import peak_bytes, reset_peak
from mkaq.walk.activations import Activations
from mkaq.walk.walk import LayerWalk

K = 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    arrange_heap(sparing=True)
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(options.shape)
        if options.shape in CONFIGS:
            model = Path(scratch) / "model"
            write_checkpoint(model, options.shape, options.layers)
        walk = LayerWalk(
            open_checkpoint(model),
            torch.device("cpu"),
            activations=Activations(torch.device("cpu"), "files", Path(scratch)),
        )
        found = measured(walk, options.samples, options.length, options.steps)
        print(json.dumps({"command": command_line("distill_step")} | found, indent=2))


def measured(walk: LayerWalk, samples: int, length: int, steps: int) -> dict[str, object]:
    """The median time of a step, and the peak of the process while it takes them."""
    walk.use_eager_attention()
    lesson, times = lesson_of(walk, samples, length), list[float]()
    fast = walk.ranks.has_fast_bfloat16(walk.device)
    with walk.final_norm() as norm, walk.unembedding(torch.bfloat16 if fast else None) as logits:
        learners = [Learner(walk, index, None, resident=False) for index in range(walk.num_layers)]
        student = Student(walk, learners, norm, logits)
        reset_peak()
        for number in range(1, steps + 1):
            began = time.perf_counter()
            student.in_turn(lesson, number, 1e-5)
            times.append(time.perf_counter() - began)
    tokens = samples * length
    return {
        "layers": walk.num_layers,
        "tokens": tokens,
        "seconds": sorted(times)[len(times) // 2],
        "peak_bytes": peak_bytes(),
        "machine": machine(torch.get_num_threads()),
    }


def lesson_of(walk: LayerWalk, samples: int, length: int) -> Lesson:
    """Random tokens and predictions."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = walk.checkpoint.sizes.vocabulary
    tokens = torch.randint(2, vocabulary, (samples, length), generator=generator)
    spread = torch.randn(samples * length, K, generator=generator).log_softmax(-1) - 0.1
    first = torch.randint(0, vocabulary - K, (samples * length, 1), generator=generator)
    rest = (-spread.logsumexp(-1).expm1()).log()
    told = Predictions((first + torch.arange(K)).int(), spread.half(), rest.half())
    return Lesson(tokens, torch.ones_like(tokens, dtype=torch.bool), told)


if __name__ == "__main__":
    main()
