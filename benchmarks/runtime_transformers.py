"""Worker of benchmarks/runtimes.py: transformers with GPTQModel, or with compressed-tensors."""

import os
import time
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
from runtime_job import NEW, serve
from transformers import AutoModelForCausalLM


@torch.no_grad()
def run(folder: Path, ids: list[int]) -> tuple[list[float], float]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.tensor([ids])
    scores = model(tokens).logits[0, :-1].float().log_softmax(-1)
    given = scores.gather(1, tokens[0, 1:, None]).squeeze(1).tolist()
    options = {"do_sample": False, "min_new_tokens": NEW, "max_new_tokens": NEW}
    model.generate(tokens, **options)
    start = time.perf_counter()
    model.generate(tokens, **options)
    return given, NEW / (time.perf_counter() - start)


serve(run)
