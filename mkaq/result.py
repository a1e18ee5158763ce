"""The result of a run, and its log."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mkaq.files import write_json
from mkaq.plan import RunPlan
from mkaq.ranks import Ranks
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


def write_log(
    folder: Path,
    stages: list[dict[str, Any]],
    plan: RunPlan,
    expected: Mapping[str, float],
    device: torch.device,
    ranks: Ranks,
) -> None:
    """Writes run.json: times and memory, which no digest covers."""
    log: dict[str, Any] = {
        "processes": ranks.size,
        "stages": stages,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "peak_memory_bytes": max((row["peak_memory_bytes"] for row in stages), default=0),
        "expected_memory_bytes": plan.memory_bytes,
        "expected_memory_by_stage": dict(plan.memory),
        "expected_seconds_by_stage": dict(expected),
    }
    if device.type == "cuda":
        log["peak_device_memory_bytes"] = max((row.get("peak_device_bytes", 0) for row in stages), default=0)
    write_json(folder / "run.json", log)
