"""How fast plain transformers reads and writes tokens with a model, in a process of its own.

Run it with any Python that has torch and transformers, and GPTQModel for GPTQ checkpoints. The last
line on standard output is a JSON object: tokens per second, each the median of several runs after one
that is not counted. `cpu_share` is the part of its threads' time in which it ran: others were busy on the
machine if it is well below that of other runs.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of reading a prompt and of greedy decoding, and what kind of layer multiplies."""
    # Read by GPTQModel when imported; 1, its default on two cores, makes it fail.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(arguments.threads)
    model = AutoModelForCausalLM.from_pretrained(arguments.model_dir, dtype="auto").eval()
    generator = torch.Generator().manual_seed(0)
    highest = min(model.config.vocab_size, 20_000)
    prompt = torch.randint(10, highest, (1, arguments.prompt_tokens), generator=generator)

    @torch.no_grad()
    def run() -> tuple[float, float]:
        began = time.perf_counter()
        output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        read = time.perf_counter()
        for _ in range(arguments.new_tokens):
            token = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        written = time.perf_counter()
        return arguments.prompt_tokens / (read - began), arguments.new_tokens / (written - read)

    run()
    began, busy = time.perf_counter(), time.process_time()
    prefill, decode = zip(*(run() for _ in range(arguments.repeats)), strict=True)
    share = (time.process_time() - busy) / (time.perf_counter() - began) / arguments.threads
    layers = model.get_decoder().layers
    return {
        "prefill": statistics.median(prefill),
        "decode": statistics.median(decode),
        "prefill_runs": prefill,
        "decode_runs": decode,
        "linear": type(layers[0].mlp.down_proj).__name__,
        "cpu_share": share,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Tokens per second of a model on the CPU.")
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    print(json.dumps(measure(parser.parse_args())), flush=True)
