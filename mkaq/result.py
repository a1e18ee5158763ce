"""The result of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mkaq.run.estimate import ModelSize


@dataclass
class RunResult:
    """The result of a run.

    Attributes:
        folder: The run's folder.
        sizes: Size of the source and of the model after each stage.
        evaluation: Measurements by stage.
        fallbacks: For each stage that could not do all that was asked, what it did not.
        artifact: The artifact's folder, once exported.
    """

    folder: Path
    sizes: list[ModelSize]
    evaluation: dict[str, Any]
    fallbacks: dict[str, list[str]]
    artifact: Path | None = None
