"""Worker of benchmarks/runtimes.py: vLLM on a CPU."""

import gc
import os
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from runtime_job import NEW, Answer, Stopwatch, dtype, serve
from vllm import LLM, SamplingParams


def run(folder: Path, ids: list[int], prompts: list[list[int]]) -> Answer:
    model = LLM(str(folder), dtype=dtype(), enforce_eager=True, max_model_len=256, max_num_seqs=4)
    try:
        prompt = {"prompt_token_ids": ids}
        once = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        answer = model.generate(prompt, once, use_tqdm=False)[0]
        places = zip(answer.prompt_logprobs[1:], ids[1:], strict=True)
        given = [place[token].logprob for place, token in places]
        greedy, watch, texts = SamplingParams(max_tokens=NEW, temperature=0), Stopwatch(), []
        for one in prompts:
            with watch:
                answer = model.generate({"prompt_token_ids": one}, greedy, use_tqdm=False)[0]
            texts.append(list(answer.outputs[0].token_ids))
        return Answer(given, texts, watch.speed(texts))
    finally:
        del model
        gc.collect()


if __name__ == "__main__":
    serve(run)
