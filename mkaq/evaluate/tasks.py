"""Tasks of lm-evaluation-harness, run on the whole model in memory."""

from collections.abc import Sequence
from typing import Any

import torch

from mkaq.checkpoint.reader import Checkpoint
from mkaq.errors import UsageError
from mkaq.walk.whole_model import whole_model


def run_tasks(
    checkpoint: Checkpoint,
    tokenizer: Any,
    tasks: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    *,
    limit: int | None = None,
    include_path: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores of tasks.

    Args:
        checkpoint: A dense, GPTQ or bitsandbytes checkpoint.
        tokenizer: The checkpoint's tokenizer.
        tasks: Names that lm-evaluation-harness knows.
        device: Where the model runs.
        dtype: The dtype it computes in.
        limit: The maximum number of examples per task.
        include_path: A folder with the user's own task files.

    Returns:
        For each task its metrics and their standard errors.

    Raises:
        UsageError: If the harness is not installed, or does not know a task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        fix = "pip install lm-eval"
        raise UsageError("lm-evaluation-harness is not installed", where="--tasks", fix=fix) from None
    manager = TaskManager(include_path=include_path)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise UsageError(
            f"unknown task {', '.join(unknown)}", where="--tasks", fix="`lm-eval ls tasks` lists them"
        )
    model = HFLM(pretrained=whole_model(checkpoint, device, dtype), tokenizer=tokenizer, batch_size=1)
    results = simple_evaluate(model, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False)
    return {
        task: {name.removesuffix(",none"): value for name, value in metrics.items() if "," in name}
        for task, metrics in results["results"].items()
    }
