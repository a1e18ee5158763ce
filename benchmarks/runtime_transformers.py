"""Worker of benchmarks/runtimes.py: transformers with GPTQModel, or with compressed-tensors."""

import os
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
from runtime_job import NEW, Answer, Stopwatch, dtype, serve
from transformers import AutoModelForCausalLM


@torch.no_grad()
def run(folder: Path, ids: list[int], prompts: list[list[int]]) -> Answer:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype())
    tokens = torch.tensor([ids])
    scores = model(tokens).logits[0, :-1].float().log_softmax(-1)
    given = scores.gather(1, tokens[0, 1:, None]).squeeze(1).tolist()
    watch, texts = Stopwatch(), []
    for prompt in prompts:
        with watch:
            output = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW)
        texts.append(output[0, len(prompt) :].tolist())
    return Answer(given, texts, watch.speed(texts))


serve(run)
