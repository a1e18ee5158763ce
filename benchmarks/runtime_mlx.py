"""Worker of benchmarks/runtimes.py: mlx-lm, on a CPU."""

import time
from pathlib import Path

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model
from runtime_job import NEW, serve


def run(folder: Path, ids: list[int]) -> tuple[list[float], float]:
    model, _ = load_model(folder)
    tokens = mx.array(ids)
    logits = model(tokens[None])[0, :-1].astype(mx.float32)
    scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    given = mx.take_along_axis(scores, tokens[1:, None], axis=1).squeeze(1).tolist()
    steps = generate_step(tokens, model, max_tokens=NEW + 1)
    next(steps)
    start = time.perf_counter()
    for _ in steps:
        pass
    return given, NEW / (time.perf_counter() - start)


serve(run)
