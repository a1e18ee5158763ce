"""What the workers of benchmarks/runtimes.py share; each runs in an environment of its own, without mkaq."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

MARK = "RESULT "
NEW = 32


class Answer(NamedTuple):
    """What a runtime does with an artifact.

    Attributes:
        scores: The log-probability of each token of a text after the first.
        texts: The likeliest continuation of each prompt, `NEW` tokens or up to the end of the text.
        tokens_per_second: The speed of the continuations, as far as the runtime tells them from the prompt.
    """

    scores: list[float]
    texts: list[list[int]]
    tokens_per_second: float


class Stopwatch:
    """The seconds in its `with` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._began

    def speed(self, texts: list[list[int]]) -> float:
        """Tokens of the texts per second."""
        return sum(map(len, texts)) / self.seconds


def dtype() -> str:
    """The type to compute in, where a runtime has a choice: its name, or `auto` for the artifact's own."""
    return sys.argv[3]


def serve(run: Callable[[Path, list[int], list[list[int]]], Answer]) -> None:
    """Runs every folder of the command line and prints one line for each.

    usage of a worker: WORKER JSON_LIST_OF_TOKEN_IDS JSON_LIST_OF_PROMPTS DTYPE FOLDER...

    Args:
        run: Loads a folder; returns what it says of a text and of prompts, both token ids.
    """
    ids, prompts = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    for folder in sys.argv[4:]:
        try:
            row = {"folder": folder, **run(Path(folder), ids, prompts)._asdict()}
        except Exception as error:  # what a runtime raises is what is asked here
            text = " ".join(str(error).split())
            row = {"folder": folder, "error": f"{type(error).__name__}: {text[:400]}"}
        print("\n" + MARK + json.dumps(row), flush=True)
