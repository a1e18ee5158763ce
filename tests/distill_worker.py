"""Takes two steps of a distillation, one layer at a time, in files, and prints the peak memory of them."""

import sys
from pathlib import Path

import torch

from mkaq.checkpoint.validate import open_checkpoint
from mkaq.distill.learner import Learner
from mkaq.distill.loss import likeliest
from mkaq.distill.student import Lesson, Student
from mkaq.heap import arrange_heap
from mkaq.peak import peak_bytes, reset_peak
from mkaq.walk.activations import Activations
from mkaq.walk.walk import LayerWalk


def main() -> None:
    model, scratch, samples, length = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:5])
    torch.set_num_threads(1)
    arrange_heap(sparing=True)
    cpu = torch.device("cpu")
    walk = LayerWalk(open_checkpoint(model), cpu, activations=Activations(cpu, "files", scratch))
    walk.use_eager_attention()
    generator = torch.Generator().manual_seed(0)
    vocabulary = walk.checkpoint.sizes.vocabulary
    tokens = torch.randint(2, vocabulary, (samples, length), generator=generator)
    told = likeliest(torch.randn(samples * length, vocabulary, generator=generator), 16)
    lesson = Lesson(tokens, torch.ones_like(tokens, dtype=torch.bool), told)
    with walk.final_norm() as norm, walk.unembedding() as logits:
        learners = [Learner(walk, index, None, resident=False) for index in range(walk.num_layers)]
        student = Student(walk, learners, norm, logits)
        reset_peak()
        for number in (1, 2):
            student.in_turn(lesson, number, 1e-4)
    print(peak_bytes())


if __name__ == "__main__":
    main()
