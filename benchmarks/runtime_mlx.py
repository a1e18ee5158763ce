"""Worker of benchmarks/runtimes.py: mlx-lm, on a CPU."""

from pathlib import Path

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model
from runtime_job import NEW, Answer, Stopwatch, serve


def run(folder: Path, ids: list[int], prompts: list[list[int]]) -> Answer:
    model, _ = load_model(folder)
    tokens = mx.array(ids)
    logits = model(tokens[None])[0, :-1].astype(mx.float32)
    scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    given = mx.take_along_axis(scores, tokens[1:, None], axis=1).squeeze(1).tolist()
    watch, texts = Stopwatch(), []
    for prompt in prompts:
        with watch:
            texts.append([int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=NEW)])
    return Answer(given, texts, watch.speed(texts))


serve(run)
