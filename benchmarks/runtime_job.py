"""What the workers of benchmarks/runtimes.py share; each runs in an environment of its own, without mkaq."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

MARK = "RESULT "
NEW = 16
Run = Callable[[Path, list[int]], tuple[list[float], float]]


def serve(run: Run) -> None:
    """Runs every folder of the command line and prints one line for each.

    usage of a worker: WORKER JSON_LIST_OF_TOKEN_IDS FOLDER...

    Args:
        run: Loads a folder; returns the log-probability of each token after the first, and the tokens per
            second of decoding `NEW` tokens after them.
    """
    ids = json.loads(sys.argv[1])
    for folder in sys.argv[2:]:
        try:
            scores, speed = run(Path(folder), ids)
            row = {"folder": folder, "scores": scores, "tokens_per_second": speed}
        except Exception as error:  # what a runtime raises is what is asked here
            text = " ".join(str(error).split())
            row = {"folder": folder, "error": f"{type(error).__name__}: {text[:400]}"}
        print("\n" + MARK + json.dumps(row), flush=True)
