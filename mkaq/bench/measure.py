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
from mkaq.formats.runtimes import TARGETS, format_for

_PACKAGES = {  # what a runtime is imported as
    "transformers": "transformers",
    "vllm": "vllm",
    "vllm-cpu": "vllm",
    "onnx": "onnxruntime_genai",
    "mlx": "mlx_lm",
    "llama.cpp": "xllamacpp",
}
_READERS = {"gptq": "gptqmodel", "bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed_tensors"}


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
        model: The folder.
        runtime: The runtime.
        format: The format that it takes.
        bytes: Of the weights on disk.
        load_seconds: Until it is ready.
        prefill: Tokens of a prompt per second.
        decode: New tokens per second after the first.
        peak_memory_bytes: The process's peak resident set, or its peak on a GPU.
        reason: Why it was not measured.
    """

    model: str
    runtime: str
    format: str = ""
    bytes: int = 0
    load_seconds: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    peak_memory_bytes: int = 0
    reason: str = ""


def speeds(folder: Path, load: Load, *, cuda: bool) -> Iterator[Speed]:
    """Measures a model in one runtime after the other.

    Args:
        folder: An artifact or any other checkpoint.
        load: What is measured.
        cuda: Whether a GPU is there; vLLM then runs on it.

    Raises:
        CheckpointError: If the checkpoint is damaged.
    """
    model = open_checkpoint(folder, quantized=True)
    formats = [name for name in EXPORTS if (folder / name).is_dir()]
    for key, package in _PACKAGES.items():
        if key == ("vllm-cpu" if cuda else "vllm"):
            continue
        name = TARGETS[key]
        form, reason = format_for(name, model.quantization, formats)
        if find_spec(package) is None:
            reason = f"{package} is not installed"
        elif key == "transformers" and (reader := _reader(model, form)) and find_spec(reader) is None:
            reason = f"{reader} is not installed"
        yield Speed(str(folder), name, form, reason=reason) if reason else _measured(folder, key, form, load)


def _reader(model: Checkpoint, form: str) -> str:
    """The package by which transformers reads quantized weights."""
    method = str((model.quantization or {}).get("quant_method", ""))
    return _READERS.get(form if form != "safetensors" else method, "")


def _measured(folder: Path, key: str, form: str, load: Load) -> Speed:
    """A model in a runtime, in a process of its own."""
    place = folder if form == "safetensors" else folder / form
    files = list(place.glob("*.gguf" if form == "gguf" else "*.safetensors"))
    engine = key.removesuffix("-cpu")
    model = files[0] if form == "gguf" else place
    numbers = load.threads, load.prompt_tokens, load.new_tokens, load.repeats
    command = [sys.executable, "-m", "mkaq.bench.worker", engine, model, *numbers]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(load.threads)}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=env, errors="replace")
    found = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not found:
        last = (done.stderr.strip().splitlines() or [f"it ends with code {done.returncode}"])[-1]
        return Speed(str(folder), TARGETS[key], form, reason=f"it fails: {last[:300]}")
    values: dict[str, Any] = json.loads(found[-1].removeprefix(MARK))
    memory = values.pop("peak_device_bytes", values.pop("peak_memory_bytes"))
    size = sum(file.stat().st_size for file in files)
    return Speed(str(folder), TARGETS[key], form, size, **values, peak_memory_bytes=memory)
