"""Quantize a model with llm-compressor on the CPU, in a process of its own, or read what it wrote.

Run it with the Python of an environment where llm-compressor is installed. The last line on standard
output is a JSON object that says what happened. llm-compressor keeps its own defaults (min-max
scales, blocks of 128 columns and so on) where no option says otherwise, and runs its sequential
pipeline: one decoder layer after the other, each on the outputs of quantized layers.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def quantize(arguments: argparse.Namespace) -> dict[str, Any]:
    """Quantize and save the model; return what happened as plain JSON values."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from loguru import logger
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    warnings: list[str] = []
    logger.add(lambda message: warnings.append(message.record["message"]), level="WARNING")
    rows = load_file(arguments.calibration)["input_ids"].tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    weights = {"num_bits": arguments.bits, "type": "int", "symmetric": True}
    weights |= {"strategy": "channel" if arguments.group_size == -1 else "group"}
    weights |= {} if arguments.group_size == -1 else {"group_size": arguments.group_size}
    recipe = GPTQModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head"],
        dampening_frac=arguments.damp_percent,
        actorder="static" if arguments.act_order else None,
        batched_quantization=8,  # modules of one shape together; its own choice on a CPU is one at a time
    )
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(arguments.model_dir, dtype=arguments.dtype)
    loaded = time.perf_counter()
    model = oneshot(
        model=model,
        tokenizer=str(arguments.model_dir),
        dataset=data,
        recipe=recipe,
        pipeline="sequential",
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
        max_seq_length=len(rows[0]),
        batch_size=arguments.batch_size,
    )
    quantized = time.perf_counter()
    # It rounds to nearest where the Hessian cannot be factorized, and says so in a warning.
    if fallback := [text for text in warnings if "round-to-nearest" in text]:
        raise RuntimeError(fallback[0])
    model.save_pretrained(arguments.out_dir, save_compressed=True)
    return {
        "seconds": round(quantized - loaded, 3),
        "seconds_load": round(loaded - started, 3),
        "seconds_save": round(time.perf_counter() - quantized, 3),
        "modules": sum(hasattr(module, "quantization_scheme") for module in model.modules()),
        "calibration_tokens": sum(map(len, rows)),
        "threads": torch.get_num_threads(),
        "versions": {
            name: version(name) for name in ("llmcompressor", "compressed-tensors", "torch", "transformers")
        },
    }


def read(arguments: argparse.Namespace) -> dict[str, Any]:
    """Logits of the first calibration row by the product's own reader, in float32, into a file."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    row = load_file(arguments.calibration)["input_ids"][:1].long()
    model = AutoModelForCausalLM.from_pretrained(arguments.model_dir, dtype=torch.float32)
    with torch.no_grad():
        save_file({"logits": model(row).logits[0].float().contiguous()}, arguments.out_dir)
    return {"tokens": row.shape[1]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Quantize a model with llm-compressor on the CPU.")
    parser.add_argument("model_dir", type=Path)
    parser.add_argument(
        "calibration", type=Path, help="safetensors file with rows of `input_ids`, one length"
    )
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--read", action="store_true", help="write logits of model_dir into the file out_dir")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128, help="-1: one group per row")
    parser.add_argument("--damp-percent", type=float, default=0.01)
    parser.add_argument(
        "--act-order", action="store_true", help="columns by falling activation, groups fixed"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="rows at a time")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    options = parser.parse_args()
    print(json.dumps(read(options) if options.read else quantize(options)), flush=True)
