"""The paper's published script on a given model and given prompts, in a process of its own.

Run it with a Python that has the script's requirements (torch, transformers, scikit-learn, pandas,
tqdm). The script's own functions do the work, called as its `main` calls them, but for what is fixed
there: the folders, the MMLU prompts and a GPU. The last line of standard output is a JSON object.
"""

import argparse
import importlib.util
import json
import pickle
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

WEIGHTS = [f"mlp.{name}_proj.weight" for name in ("down", "up", "gate")] + [
    f"self_attn.{name}_proj.weight" for name in ("k", "o", "q", "v")
]


def merge(script: ModuleType, model_dir: Path, prompts: Path, layers: int, out_dir: Path) -> dict[str, Any]:
    """Loads a model, compares its layers, removes some and saves it; returns what it took.

    Args:
        script: The paper's pipeline.py.
        model_dir: The model.
        prompts: A safetensors file with rows of `input_ids`.
        layers: How many to remove.
        out_dir: Where the embeddings and the model go.
    """
    rows = load_file(prompts)["input_ids"].long()
    embeddings = out_dir / "embeddings"
    embeddings.mkdir(parents=True)
    script.set_seed(1)
    began = time.perf_counter()
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).to(device)
    loaded = time.perf_counter()
    left = model.config.num_hidden_layers
    activations: list[list[Any]] = [[] for _ in range(left)]
    for row in rows:
        for index in range(left):
            activations[index].append(script.extract_layer_params(model, index, row[None].to(device)))
        script.clear_memory()
    for index, of_layer in enumerate(activations):
        stacked = np.vstack(of_layer)
        embedded = script.diffusionKernel(stacked, sigmaK=8, alpha=0.5, d=2, total_size=len(stacked))
        (embeddings / f"layer_{index}_embedded.pkl").write_bytes(pickle.dumps(embedded))
    similarity = script.compute_similarity_matrix_npib_global(script.load_embeddings(str(embeddings)))
    compared = time.perf_counter()
    for _ in range(layers):
        share = script.compute_fusion_ratios(similarity, [(left - 2, left - 1)])[0][0]
        model = script.layer_fusion(model, left - 2, left - 1, share, WEIGHTS)
        left -= 1
    model.config.num_hidden_layers = left
    model.config.save_pretrained(out_dir)
    torch.save(model.state_dict(), out_dir / "pytorch_model.bin")
    ended = time.perf_counter()
    return {
        "seconds": ended - began,
        "seconds_load": loaded - began,
        "seconds_compare": compared - loaded,
        "peak_bytes": peak_bytes(),
    }


def peak_bytes() -> int:
    """Peak resident memory of this process alone; `ru_maxrss` begins with that of the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024


def load_script(path: Path) -> ModuleType:
    """The script as a module; its `main` does not run."""
    spec = importlib.util.spec_from_file_location("paper_pipeline", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run the paper's published script.")
    parser.add_argument("script", type=Path, help="its pipeline.py")
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("prompts", type=Path, help="safetensors file with rows of `input_ids`")
    parser.add_argument("layers", type=int, help="how many to remove")
    parser.add_argument("out_dir", type=Path)
    given = parser.parse_args()
    script = load_script(given.script)
    print(json.dumps(merge(script, given.model_dir, given.prompts, given.layers, given.out_dir)), flush=True)
