"""Quantize a model to nf4 as the users of transformers do, with bitsandbytes, on the CPU.

Weights are quantized while the model is loaded, so the seconds of both are one number. The last line
on standard output is a JSON object that says what happened.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def quantize(model_dir: Path, out_dir: Path) -> dict[str, Any]:
    """Quantize and save the model; return what happened as plain JSON values."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(model_dir, quantization_config=config, device_map="cpu")
    quantized = time.perf_counter()
    model.save_pretrained(out_dir)
    return {
        "seconds": round(quantized - started, 3),
        "seconds_save": round(time.perf_counter() - quantized, 3),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("bitsandbytes", "torch", "transformers")},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Quantize a model to nf4 with bitsandbytes on the CPU.")
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("out_dir", type=Path)
    options = parser.parse_args()
    print(json.dumps(quantize(options.model_dir, options.out_dir)), flush=True)
