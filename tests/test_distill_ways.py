"""A step with all layers at once, and with one at a time, are the same step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.memory import write_model
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.distill.adapter import Adapter
from mkaq.distill.learner import Learner
from mkaq.distill.student import Lesson, Student
from mkaq.distill.teacher import Teacher, write_predictions
from mkaq.progress import Progress
from mkaq.run.memory import saved_for_backward
from mkaq.walk.activations import Activations
from mkaq.walk.walk import LayerWalk
from tests.runs import ROOT
from tests.tiny import FAMILIES, make_model

pytestmark = pytest.mark.usefixtures("one_thread")
CPU, LENGTH, K = torch.device("cpu"), 24, 16
STEPS = 3


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_saves_for_backward_what_plan_expects(family: str, fast: bool, tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "head_dim": 32}
    model = open_checkpoint(make_model(tmp_path / "model", family, **sizes))
    walk, length = LayerWalk(model, CPU, torch.float32), 128
    walk.use_eager_attention()
    saved = dict[int, int]()

    def noted(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)  # so that its place is not used again
        return tensor

    kept = list[torch.Tensor]()
    with (
        walk.layer(0) as layer,
        torch.autograd.graph.saved_tensors_hooks(noted, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=fast),
    ):
        layer.requires_grad_(True)
        walk.run(layer, 0, torch.randn(4, length, 128, requires_grad=True))
        own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    shapes = {shape for weight in layer.parameters() for shape in (weight.shape, weight.shape[::-1])}
    copies = {tensor.untyped_storage().data_ptr() for tensor in kept if tensor.shape in shapes}
    found = sum(size for place, size in saved.items() if place not in own | copies) / (4 * length)
    expected = saved_for_backward(model.sizes, length, eager=True)
    assert (0.4 if fast else 0.6) * expected < found <= 1.2 * expected, (found, expected)


def lessons(folder: Path, family: str) -> list[Lesson]:
    """What a model of four layers predicts, for each of some steps; of the first one a part counts."""
    tokens = torch.randint(2, 500, (4 * STEPS, LENGTH), generator=torch.Generator().manual_seed(0))
    source = LayerWalk(open_checkpoint(make_model(folder / "source", family, layers=4)), CPU)
    write_predictions(source, tokens, K, folder, Progress(quiet=True))
    teacher = Teacher(folder, LENGTH, K)
    learned = torch.ones_like(tokens, dtype=torch.bool)
    learned[:4, LENGTH // 2 :] = False
    rows = [range(4 * step, 4 * step + 4) for step in range(STEPS)]
    return [Lesson(tokens[list(own)], learned[list(own)], teacher.predictions(own)) for own in rows]


def trained(
    model: Path, taught: list[Lesson], folder: Path, *, together: bool, adapter: Adapter | None = None
) -> tuple[list[dict[str, torch.Tensor]], list[float], torch.Tensor]:
    """The weights of every layer after the steps, the losses, and the divergences on the first lesson."""
    place = Activations(CPU) if together else Activations(CPU, "files", folder)
    walk = LayerWalk(open_checkpoint(model), CPU, activations=place)
    with walk.final_norm() as norm, walk.unembedding() as logits:
        learners = [Learner(walk, index, adapter, resident=together) for index in range(walk.num_layers)]
        student = Student(walk, learners, norm, logits, cross_entropy=0.2)
        step = student.together if together else student.in_turn
        losses = [step(lesson, number, 1e-3) for number, lesson in enumerate(taught, 1)]
        return (
            [learner.saved(torch.float32) for learner in learners],
            losses,
            student.divergences(taught[0], torch.float32),
        )


def same(folder: Path, family: str, adapter: Adapter | None = None) -> None:
    taught, model = lessons(folder, family), make_model(folder / "model", family, layers=3)
    whole, losses, apart = trained(model, taught, folder, together=True, adapter=adapter)
    turns, its_losses, its_apart = trained(model, taught, folder, together=False, adapter=adapter)
    assert losses == pytest.approx(its_losses, rel=1e-5)
    assert torch.allclose(apart, its_apart, atol=1e-4)
    before = open_checkpoint(model)
    for index, (one, other) in enumerate(zip(whole, turns, strict=True)):
        assert one.keys() == other.keys() == before.read_layer(index).keys()
        for name, tensor in one.items():
            moved = (tensor - before.read_layer(index)[name].float()).abs().max()
            away = (tensor - other[name]).abs().max()
            assert away <= 0.02 * moved + 1e-7, (index, name, float(away), float(moved))


@pytest.mark.parametrize("family", FAMILIES)
def test_both_ways_agree(family: str, tmp_path: Path) -> None:
    same(tmp_path, family)


def test_the_text_itself_is_learned_where_the_next_token_is_known(tmp_path: Path) -> None:
    """With all the weight on cross-entropy the loss is that of every token but the first of a row; after the
    last one the divergence counts."""
    taught, model = lessons(tmp_path, "llama")[1], make_model(tmp_path / "model", layers=3)
    walk = LayerWalk(open_checkpoint(model), CPU)
    with walk.final_norm() as norm, walk.unembedding() as logits:
        learners = [Learner(walk, index, None, resident=True) for index in range(3)]
        student = Student(walk, learners, norm, logits, cross_entropy=1.0)
        apart = student.divergences(taught, torch.float32)[:, -1]
        loss = student.together(taught, 1, 0.0)
    *_, (_, states) = walk.hidden_states(taught.tokens)
    with walk.head() as head:
        scores = head(states).float()[:, :-1].flatten(0, 1)
    text = torch.nn.functional.cross_entropy(scores, taught.tokens[:, 1:].flatten(), reduction="none")
    assert loss == pytest.approx(float(torch.cat([text, apart]).mean()), rel=1e-4)


def test_both_ways_agree_with_an_adapter(tmp_path: Path) -> None:
    same(tmp_path, "llama", Adapter(4, 8, 0))


def test_one_layer_at_a_time_is_flat_in_depth(tmp_path: Path) -> None:
    """The peak of the process; all layers' weights, their optimizer and inputs are in files."""
    peaks = []
    for layers in (8, 16, 32):
        write_model(tmp_path / str(layers), layers, 512)
        line = ["-m", "benchmarks.distill_step", tmp_path / str(layers), "--samples=8", "--length=64"]
        line = [sys.executable, *map(str, line), "--steps=2", "--threads=1"]
        done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        peaks.append(json.loads(done.stdout)["peak_bytes"])
    assert max(peaks) < 1.1 * min(peaks), peaks
