"""Measures one model in one runtime, in a process of its own; prints one line of JSON.

usage: python -m mkaq.bench.worker RUNTIME MODEL THREADS PROMPT_TOKENS NEW_TOKENS REPEATS
"""

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from mkaq.bench.engines import ENGINES, onnx_model
from mkaq.peak import peak_bytes

MARK = "RESULT "
_TOKENS = range(10, 250)  # every vocabulary has these


def main() -> None:
    """Loads the model, runs it once, and then measures it."""
    runtime, path = sys.argv[1], Path(sys.argv[2])
    threads, prompt, new, repeats = map(int, sys.argv[3:])
    with tempfile.TemporaryDirectory() as folder:
        loaded = onnx_model(path, Path(folder)) if runtime == "onnx" else path
        began = time.perf_counter()
        run = ENGINES[runtime](loaded, threads, prompt + new + 1)
        load_seconds = time.perf_counter() - began
        ids = random.Random(0).choices(_TOKENS, k=prompt)
        run(ids, new)
        read, written = zip(*(run(ids, new) for _ in range(repeats)), strict=True)
    found = {
        "load_seconds": load_seconds,
        "prefill_tokens_per_second": prompt / median(read),
        "decode_tokens_per_second": new / median(written),
        "peak_memory_bytes": peak_bytes(),
    }
    if "torch" in sys.modules and (torch := sys.modules["torch"]).cuda.is_initialized():
        found["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    print("\n" + MARK + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
