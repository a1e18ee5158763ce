"""What a run comes to."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mkaq.run.plan import StageSize


@dataclass
class RunResult:
    """What a run made.

    Attributes:
        folder: Of the run.
        sizes: The model as it came and after each stage.
        evaluation: What was measured, by stage.
        artifact: What the user ships, once exported.
    """

    folder: Path
    sizes: list[StageSize]
    evaluation: dict[str, Any] = field(default_factory=dict)
    artifact: Path | None = None

    @property
    def perplexity(self) -> float:
        """Of the last model that was measured."""
        return float(self.evaluation[self.sizes[-1].stage]["perplexity"]["perplexity"])

    @property
    def source_perplexity(self) -> float:
        """Of the source."""
        return float(self.evaluation["source"]["perplexity"]["perplexity"])
