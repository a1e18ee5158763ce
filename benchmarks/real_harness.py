"""Runs the task files of benchmarks/real_tasks.py on a model in memory, with lm-evaluation-harness.

Nothing is read from a network.
"""

import logging
import os
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from benchmarks.real_tasks import IFEVAL, PREFIX, ZERO_SHOT
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.errors import UsageError
from mkaq.walk.whole_model import whole_model

BATCH_TOKENS = {"cpu": 1024, "cuda": 16_384}
NEEDED = ("lm_eval", "langdetect", "immutabledict", "nltk")


def prepare() -> None:
    """Checks that the harness is there, and keeps it quiet and off the network; before its import.

    Raises:
        UsageError: If it is not installed, or what IFEval needs.
    """
    if missing := [name for name in NEEDED if not find_spec(name)]:
        fix = "pip install 'lm-eval[ifeval]'"
        raise UsageError(f"needs {', '.join(missing)}", where="--eval-data", fix=fix)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        os.environ[name] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


class Harness:
    """A model for all tasks, put into memory when the first is run.

    Args:
        folder: Of a dense or GPTQ checkpoint.
        tokenizer: Its tokenizer; generation uses its chat template, if there is one.
        device: Where the model runs.
        dtype: The dtype it computes in.
        batch_size: Texts that are generated at once.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Any,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int,
    ) -> None:
        self._folder, self._device, self._dtype = folder, device, dtype
        self._tokenizer, self._batch_size = tokenizer, batch_size
        self._model: Any = None

    def run(self, task: str, folder: Path) -> dict[str, Any]:
        """The score of a task whose files are in a folder, and of each item.

        Returns:
            `items`: for each item 0 or 1. IFEval's are whether all instructions of a prompt are followed
            (strict), and it has `instructions`, the share of all single instructions followed.
        """
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from benchmarks.packed_scoring import PackedModel

        if self._model is None:
            checkpoint = open_checkpoint(self._folder, quantized=True)
            model = whole_model(checkpoint, self._device, self._dtype)
            tokens = BATCH_TOKENS[self._device.type]
            self._model = PackedModel(model, self._tokenizer, tokens, self._batch_size)
        chat = task == IFEVAL and bool(getattr(self._tokenizer, "chat_template", None))
        with redirect_stderr(StringIO()):  # progress bars
            found = simple_evaluate(
                self._model,
                tasks=[PREFIX + task],
                task_manager=TaskManager(include_path=str(folder), include_defaults=False),
                bootstrap_iters=0,
                apply_chat_template=chat,
                log_samples=True,
            )
        assert found is not None
        samples = sorted(found["samples"][PREFIX + task], key=lambda sample: int(sample["doc_id"]))
        if task in ZERO_SHOT:
            return {"items": [int(sample[ZERO_SHOT[task][1]]) for sample in samples]}
        single = [followed for sample in samples for followed in sample["inst_level_strict_acc"]]
        return {
            "items": [int(sample["prompt_level_strict_acc"]) for sample in samples],
            "instructions": sum(single) / len(single),
            "chat_template": chat,
        }


def find_sentences_in(folder: Path) -> None:
    """Lets nltk look for its data in a folder, before any other place."""
    import nltk

    nltk.data.path.insert(0, str(folder))
