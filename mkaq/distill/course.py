"""The steps of a distillation, its measurements on held-out tokens, and the best weights so far."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mkaq.checkpoint.finished import Finished
from mkaq.checkpoint.output import Output
from mkaq.distill.adapter import Adapter
from mkaq.distill.gate import Check, best_check, ending, is_over, length_of_steps
from mkaq.distill.learner import Learner, copied
from mkaq.distill.student import Lesson, Student
from mkaq.distill.teacher import Teacher
from mkaq.distill.text import Text
from mkaq.recover.steps import schedule, shuffled
from mkaq.walk.walk import LayerWalk

CHECKS = 16  # measurements on held-out tokens
WARM_UP = 20  # steps at least, since AdamW's first ones are as long on a weight that matters little as on any


@dataclass(frozen=True)
class Training:
    """How a model learns.

    Attributes:
        steps: Optimizer steps at most.
        batch_size: Sequences per step, of all processes.
        learning_rate: AdamW's peak learning rate; it follows `schedule` and `length_of_steps`.
        eased: Whether a model that has lost little starts with less of it.
        cross_entropy: The weight of the loss on the text itself.
        adapter: Train a low-rank change of the weights; None: the weights.
        seed: Seed of the order of the sequences.
        together: Whether all layers are on the device at once, or one at a time.
    """

    steps: int
    batch_size: int
    learning_rate: float
    eased: bool
    cross_entropy: float
    adapter: Adapter | None
    seed: int
    together: bool


class Course:
    """The steps of a distillation, its measurements, and the best weights so far."""

    def __init__(
        self,
        student: Student,
        learners: Sequence[Learner],
        teacher: Teacher,
        text: Text,
        training: Training,
        output: Output,
        walk: LayerWalk,
        finished: Finished | None,
    ) -> None:
        self._student, self._learners, self._teacher, self._text = student, learners, teacher, text
        self._training, self._output, self._walk = training, output, walk
        self._finished = finished or Finished(None, walk.ranks)
        self._checks: list[Check] = []
        self._learn: Callable[[Lesson, int, float], float] = (
            student.together if training.together else student.in_turn
        )
        self.kept = [copied(walk, learner.saved(output.dtype)) for learner in learners]

    def run(self) -> tuple[list[Check], int]:
        """Takes the steps; afterwards `kept` has the best weights of every layer."""
        steps, rate, loss, learned = self._training.steps, self._training.learning_rate, 0.0, 0
        if not self._resume():
            self._checks.append(Check(0, None, *self._measured()))
            self._keep()
        done, every = self._checks[-1].step, -(-steps // CHECKS)
        orders = shuffled(self._text.train, self._training.batch_size, self._training.seed)
        numbered = zip(range(1, steps + 1), orders, strict=False)
        for step, chosen in self._output.progress.track(numbered, "recover (distill)", steps):
            if step <= done:
                continue
            if is_over(self._checks):
                last = self._checks[-1].step
                self._output.progress.say(f"  ended after step {last}: {ending(self._checks)}")
                break
            own = chosen[self._walk.ranks.slice_of(len(chosen))].tolist()
            share = length_of_steps(self._checks, eased=self._training.eased)
            share *= schedule(step - 1, steps, WARM_UP)
            lesson = self._lesson(own)
            loss, learned = (
                loss + self._learn(lesson, step, rate * share) * lesson.learns,
                learned + lesson.learns,
            )
            if step % every == 0 or step == steps:
                check = Check(step, self._walk.ranks.mean(loss / max(1, learned), learned), *self._measured())
                if not math.isfinite(check.own + check.other + (check.loss or 0.0)):
                    self._output.progress.say(f"  step {step}: not finite; the learning rate is too high")
                    break
                self._checks.append(check)
                loss, learned = 0.0, 0
                self._take_best()
                self._keep()
                self._output.progress.say(_line(self._checks))
        return self._checks, best_check(self._checks)

    def _lesson(self, rows: Sequence[int]) -> Lesson:
        told = self._teacher.predictions(rows)
        return Lesson(self._text.tokens[list(rows)], self._text.learned[list(rows)], told)

    def _measured(self) -> tuple[float, float]:
        """The mean divergences on the held-out sequences and on those of other text."""
        ranks, text = self._walk.ranks, self._text
        rows = [rows[ranks.slice_of(len(rows))] for rows in (text.own, text.other)]
        lesson = self._lesson([*rows[0], *rows[1]])
        found = self._student.divergences(lesson, self._output.dtype)
        cut = len(rows[0])
        parts = (found[:cut], lesson.learned[:cut]), (found[cut:], lesson.learned[cut:])
        counted = (part[learned].double() for part, learned in parts)
        own, other = (ranks.mean(float(part.sum()) / max(1, len(part)), len(part)) for part in counted)
        return own, other

    def _take_best(self) -> None:
        if best_check(self._checks) == len(self._checks) - 1:
            for kept, learner in zip(self.kept, self._learners, strict=True):
                for name, tensor in learner.saved(self._output.dtype).items():
                    kept[name].copy_(tensor)
                self._walk.activations.release()

    def _keep(self) -> None:
        """Keeps what to go on from, in the place of the state before the last one."""
        if not (self._finished.keeps and self._walk.ranks.is_main):
            return
        first, step = self._place(len(self._checks) - 1), self._checks[-1].step
        for index, (learner, kept) in enumerate(zip(self._learners, self.kept, strict=True)):
            best = {f"kept.{name}": tensor.cpu() for name, tensor in kept.items()}
            self._finished.keep(first + index, {**learner.state(), **best}, step)
            self._walk.activations.release()
        self._finished.keep(first + len(self._learners), {}, [list(check) for check in self._checks])

    def _resume(self) -> bool:
        """Goes on from the last state that is there whole, if there is one."""
        states = [self._finished.find(self._place(slot) + len(self._learners)) for slot in range(2)]
        found = sorted((state[1] for state in states if state), key=len, reverse=True)
        return any(self._restored([Check(*check) for check in checks]) for checks in found)

    def _restored(self, checks: list[Check]) -> bool:
        first, step = self._place(len(checks) - 1), checks[-1].step
        for index, (learner, kept) in enumerate(zip(self._learners, self.kept, strict=True)):
            part = self._finished.find(first + index)
            if part is None or part[1] != step:
                return False
            learner.restore(part[0])
            for name, tensor in kept.items():
                tensor.copy_(part[0][f"kept.{name}"])
            self._walk.activations.release()
        self._checks = checks
        return True

    def _place(self, number: int) -> int:
        """The number of the first part of a state: two states are kept in turn."""
        return number % 2 * (len(self._learners) + 1)


def _line(checks: Sequence[Check]) -> str:
    now, first = checks[-1], checks[0]
    own, other = f"{first.own:.4f} -> {now.own:.4f}", f"{first.other:.4f} -> {now.other:.4f}"
    return f"  step {now.step}: loss {now.loss:.4f}, held-out divergence {own}, on other text {other}"
