"""What each runtime takes to read a prompt and to write after it.

Every engine loads a model with so many threads (torch's are those of OMP_NUM_THREADS), and room for so many
tokens, and returns a function: token ids of a prompt and a number n to the seconds until the first token is
known, and the seconds for n more. Each runs in a process of its own, `mkaq.bench.worker`.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

Run = Callable[[list[int], int], tuple[float, float]]


def transformers(path: Path, threads: int, room: int) -> Run:
    """Plain transformers; GPTQModel multiplies GPTQ's layers."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # 1, its default on two cores, makes it fail
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", local_files_only=True).to(device).eval()

    @torch.no_grad()
    def run(ids: list[int], new: int) -> tuple[float, float]:
        began = time.perf_counter()
        output = model(input_ids=torch.tensor([ids], device=device), use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
        int(token)  # waits for a GPU
        read = time.perf_counter()
        for _ in range(new):
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
        int(token)
        return read - began, time.perf_counter() - read

    return run


def llamacpp(path: Path, threads: int, room: int) -> Run:
    """llama.cpp, by its own clock."""
    from mkaq.generate.llamacpp import serve

    server = serve(path, threads, room=room)

    def run(ids: list[int], new: int) -> tuple[float, float]:
        request = {"prompt": ids, "max_tokens": new + 1, "temperature": 0, "ignore_eos": True}
        timings = server.handle_completions(request | {"cache_prompt": False})["timings"]
        return timings["prompt_ms"] / 1000, timings["predicted_ms"] / 1000

    return run


def vllm(path: Path, threads: int, room: int) -> Run:
    """vLLM, on a GPU or in its build for CPUs."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import torch
    from vllm import LLM, SamplingParams

    eager = not torch.cuda.is_available()
    model = LLM(
        str(path), enforce_eager=eager, max_model_len=room, max_num_seqs=1, enable_prefix_caching=False
    )

    def seconds(ids: list[int], new: int) -> float:
        how = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
        began = time.perf_counter()
        model.generate({"prompt_token_ids": ids}, how, use_tqdm=False)
        return time.perf_counter() - began

    def run(ids: list[int], new: int) -> tuple[float, float]:
        read = seconds(ids, 1)
        return read, max(1e-9, seconds(ids, new + 1) - read)

    return run


def onnx_model(path: Path, folder: Path) -> Path:
    """What ONNX Runtime GenAI's model builder makes of a checkpoint.

    Raises:
        RuntimeError: If it fails.
    """
    quantized = "quantization_config" in json.loads((path / "config.json").read_text())
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(path), "-o", str(folder)]
    command += ["-e", "cpu", "-c", str(folder), "-p", "int4" if quantized else "fp32"]
    if quantized:
        command += ["--extra_options", "shared_embeddings=false", "nodes_to_exclude=/lm_head/MatMul"]
        command += ["accuracy_level=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"its model builder fails: {done.stderr.strip().splitlines()[-1]}")
    return folder


def onnx(path: Path, threads: int, room: int) -> Run:
    """ONNX Runtime GenAI, on what `onnx_model` has made."""
    import numpy as np
    import onnxruntime_genai as og

    config = og.Config(str(path))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)

    def run(ids: list[int], new: int) -> tuple[float, float]:
        params, length = og.GeneratorParams(model), len(ids) + new + 1
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, params)
        began = time.perf_counter()
        generator.append_tokens(np.array(ids, dtype=np.int32))
        generator.generate_next_token()
        read = time.perf_counter()
        for _ in range(new):
            generator.generate_next_token()
        return read - began, time.perf_counter() - read

    return run


def mlx(path: Path, threads: int, room: int) -> Run:
    """mlx-lm; it chooses its threads itself."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model, _ = load_model(path)

    def run(ids: list[int], new: int) -> tuple[float, float]:
        began = time.perf_counter()
        tokens = generate_step(mx.array(ids), model, max_tokens=new + 1)
        next(tokens)
        read = time.perf_counter()
        for _ in tokens:
            pass
        return read - began, time.perf_counter() - read

    return run


ENGINES: dict[str, Callable[[Path, int, int], Run]] = {
    "transformers": transformers,
    "llama.cpp": llamacpp,
    "vllm": vllm,
    "onnx": onnx,
    "mlx": mlx,
}
