"""What a run must not hide: stages that could not do as asked, and models that are broken."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mkaq.errors import VerificationError
from mkaq.units import decimal

if TYPE_CHECKING:
    from mkaq.run.job import Job
    from mkaq.stages.base import Step

BROKEN = 10.0  # times the source's perplexity

Evaluation = Mapping[str, Mapping[str, Any]]
"""Measurements by stage, as in the manifest."""


@dataclass(frozen=True)
class Bounds:
    """What a run refuses before it publishes an artifact; by default nothing.

    Attributes:
        strict: Refuse every fallback.
        limit: Largest perplexity of a model, as a ratio to the source's; None: any.
    """

    strict: bool = False
    limit: float | None = None

    def check_stage(self, job: "Job") -> None:
        """Checks the record of the stage that made the job's model.

        Raises:
            VerificationError: If it has a fallback and the run is strict.
        """
        if self.strict and (found := fallbacks_of(job.steps[-1:])):
            raise VerificationError(
                f"--strict refuses {fallback_line(found)}",
                where=job.path(job.last),
                fix="more, or more varied, text; without --strict the same command goes on",
            )

    def check_perplexity(self, job: "Job") -> None:
        """Checks the perplexity of the job's model.

        Raises:
            VerificationError: If it is beyond the limit.
        """
        times = ratio(job.evaluation, job.last)
        if self.limit is not None and times is not None and times > self.limit:
            raise VerificationError(
                f"{_compared(job.evaluation, job.last)}; the limit is {self.limit:g} times",
                where="evaluate.limit",
                fix="merge less or use more bits, or raise the limit: the same command then goes on",
            )


def fallbacks_of(steps: "Sequence[Step]") -> dict[str, list[str]]:
    """The fallbacks of each stage that has any."""
    return {step.step: found for step in steps if (found := step.fallbacks())}


def ratio(evaluation: Evaluation, stage: str) -> float | None:
    """A model's perplexity over the source's; infinite if one is not finite, None if not measured."""
    if any("perplexity" not in evaluation.get(of, {}) for of in (stage, "source")):
        return None
    after, before = _perplexity(evaluation, stage), _perplexity(evaluation, "source")
    return after / before if after is not None and before else math.inf


def quality_lines(fallbacks: Mapping[str, Sequence[str]], evaluation: Evaluation) -> Iterator[str]:
    """A line on the fallbacks, if there are any, and one for each model that is broken."""
    if fallbacks:
        yield fallback_line(fallbacks)
    for stage in evaluation:
        if stage != "source" and (ratio(evaluation, stage) or 0.0) >= BROKEN:
            yield f"WARNING: {_compared(evaluation, stage)}: do not ship this model"


def fallback_line(fallbacks: Mapping[str, Sequence[str]]) -> str:
    """All fallbacks in one line."""
    return "fallbacks: " + "; ".join(f"{stage}: {', '.join(found)}" for stage, found in fallbacks.items())


def _compared(evaluation: Evaluation, stage: str) -> str:
    """A stage's perplexity and the source's, in words."""
    after, before = (decimal(_perplexity(evaluation, of)) for of in (stage, "source"))
    times = ratio(evaluation, stage)
    if times is None or not math.isfinite(times):
        return f"the perplexity after {stage} is {after}, the source's is {before}"
    return f"the perplexity after {stage} is {after}, {times:.3g} times the source's {before}"


def _perplexity(evaluation: Evaluation, of: str) -> float | None:
    value: float | None = evaluation[of]["perplexity"]["perplexity"]
    return value
