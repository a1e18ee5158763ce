"""Worker of benchmarks/runtimes.py: llama.cpp, through xllamacpp."""

import os
from pathlib import Path

import numpy as np
from llamacpp_library import Model
from runtime_job import NEW, Answer, Stopwatch, serve


def run(folder: Path, ids: list[int], prompts: list[list[int]]) -> Answer:
    model, threads, watch = Model(next(folder.glob("*.gguf"))), os.cpu_count() or 1, Stopwatch()
    context = model.context(threads)
    logits = context.read(ids)[:-1].astype(np.float64)
    context.free()
    scores = logits[np.arange(len(ids) - 1), ids[1:]] - np.logaddexp.reduce(logits, axis=1)
    texts = []
    for prompt in prompts:
        context, text = model.context(threads), list[int]()
        last = context.read(prompt)[-1]
        with watch:
            while len(text) < NEW and not model.ends(token := int(last.argmax())):
                text.append(token)
                last = context.read([token])[-1]
        context.free()
        texts.append(text)
    return Answer(scores.tolist(), texts, watch.speed(texts))


serve(run)
