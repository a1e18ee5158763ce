"""run.json: the times and the memory of a run, which no digest covers."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkaq.files import write_json

if TYPE_CHECKING:
    import torch

    from mkaq.plan import RunPlan
    from mkaq.ranks import Ranks

LOG = "run.json"


def write_log(
    folder: Path,
    stages: list[dict[str, Any]],
    plan: "RunPlan",
    expected: Mapping[str, float],
    device: "torch.device",
    ranks: "Ranks",
) -> None:
    """Writes run.json."""
    import torch

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
    write_json(folder / LOG, log)


def making_times(folder: Path) -> dict[str, float]:
    """How many seconds the stages took that the last run in a folder made or kept, by fingerprint."""
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        stages = json.loads((folder / LOG).read_bytes())["stages"]
        made = {str(row["fingerprint"]): row.get("made_seconds") for row in stages}
        return {fingerprint: float(seconds) for fingerprint, seconds in made.items() if seconds is not None}
    return {}
