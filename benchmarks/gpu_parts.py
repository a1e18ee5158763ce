"""The parts of benchmarks/gpu_check.py: small models on the device and on the CPU, a large one timed."""

import argparse
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks import gpu_check
from benchmarks.gpu_compare import compare, stage_rows, verified
from benchmarks.gpu_kernels import compare_kernels
from benchmarks.gpu_products import product_shares
from benchmarks.machine import machine
from benchmarks.shapes import CONFIGS, write_checkpoint
from mkaq import pipeline
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.digests import library_versions
from mkaq.files import write_json
from mkaq.peak import peak_bytes, reset_peak
from mkaq.progress import Progress
from mkaq.quantize import gptq_cpu
from mkaq.quantize.gptq import PLAIN
from mkaq.recipe import Recipe
from mkaq.walk.device import pick_device

Part = tuple[str, float, Callable[[], dict[str, Any]]]
SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "max_position_embeddings": 512,
}
TINY = SMALL | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
AVERAGE = {"layers": 1, "fuse": "average", "order": "similarity"}
MEASURED = AVERAGE | {"order": "measured", "coefficient": "measured"}
UNTUNED: dict[str, Any] = {"recover": None}
CHANNELS = {"layers": 1, "fuse": "channels", "order": "measured"}
FEW = CHANNELS | {"protect": {"first": 2, "last": 1}}  # few groups are left to be measured
INT8, NF4 = ({"quantize": {"method": "bitsandbytes", "bits": bits}} for bits in (8, 4))
Sections = dict[str, dict[str, Any]]


def small_recipes(tune: dict[str, Any], group: int) -> dict[str, Sections]:
    """Every kind of merging, recovery and quantization, by name."""
    gptq = {"method": "gptq", "bits": 4, "group_size": group}
    text = {"dataset": "builtin", "num_samples": 32, "max_seq_length": 32}
    distill = {"method": "distill", "text": text, "batch_size": 8}
    three = gptq | {"bits": 3, "sym": False, "desc_act": True, "static_groups": True}
    return {
        "average_gptq4": {"merge": AVERAGE, "quantize": gptq} | UNTUNED,
        "channels_recover_gptq4_source": {
            "merge": CHANNELS,
            "recover": [tune, distill],
            "quantize": gptq | {"target": "source"},
        },
        "channels_gptq3_asym": {"merge": CHANNELS, "quantize": three} | UNTUNED,
        "merge_only": {"merge": MEASURED} | UNTUNED,
        "bitsandbytes_int8": INT8,
        "bitsandbytes_nf4": NF4,
        "float32_channels_gptq4": {"merge": CHANNELS, "quantize": gptq | {"group_size": -1}} | UNTUNED,
    }


def large_recipes(tune: dict[str, Any], group: int, evaluate: dict[str, Any]) -> dict[str, Sections]:
    """What is timed on a real model's shape, by name."""
    gptq = {"method": "gptq", "bits": 4, "group_size": group}
    return {
        "average_gptq4": UNTUNED | {"merge": AVERAGE | {"layers": 2}, "quantize": gptq, "evaluate": evaluate},
        "channels_recover_gptq4": {"merge": FEW, "recover": tune, "quantize": gptq},
        "bitsandbytes_nf4": NF4,
        "bitsandbytes_int8": INT8,
    }


class Check:
    """All parts, and what they share.

    Args:
        options: Of the command line.
        work: Folder of checkpoints and runs; what a fresh process finds there it uses.
    """

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.device, self.work, self.small = pick_device(options.device), work, options.small
        self.shape, self.layers = options.shape, 5 if options.small else options.layers
        self.changes = TINY if options.small else {}
        self.small_model, self.large_model = work / "small", work / "large"
        self.single_model = work / "float32"
        self._group = 32 if options.small else 128
        self._stage_peak = self._device_peak = 0
        if gpu_check.is_stand_in("numba"):
            gptq_cpu.NUMBA = PLAIN

    def told(self) -> dict[str, Any]:
        """The machine, the device, the libraries, and which of these are absent."""
        device: dict[str, Any] = {"name": "CPU"}
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            capability = f"{properties.major}.{properties.minor}"
            device = {"name": properties.name, "bytes": properties.total_memory, "capability": capability}
            device |= {"cuda": torch.version.cuda, "driver": driver()}
        versions = library_versions() | {"torch": torch.__version__}
        place = machine(torch.get_num_threads())
        return {"device": device, "machine": place, "libraries": versions, "absent": gpu_check.absent()}

    def parts(self) -> Iterator[Part]:
        """Name, time limit in seconds, and what is to be done, in turn."""
        tune = {"method": "layerwise", "steps": 4 if self.small else 20, "batch_size": 4}
        yield "small/build", 60, self.build_small
        for name, sections in small_recipes(tune, 32).items():
            yield f"small/{name}", 60, partial(self.run_small, name, sections)
        yield gpu_check.KERNELS, 90, self.time_kernels
        yield "large/build", 90, self.build_large
        for name, sections in large_recipes(tune, self._group, self._measured(8)).items():
            yield f"large/{name}", 180, partial(self.run_large, name, sections)
        yield "large/products", 120, self.profile

    def build_small(self) -> dict[str, Any]:
        """A random Llama in bfloat16, and the same one in float32."""
        for folder in (self.small_model, self.single_model, self.large_model):
            shutil.rmtree(folder, ignore_errors=True)  # of a process that died
        size = write_checkpoint(self.small_model, "llama3-8b", 5, 0, **(TINY if self.small else SMALL))
        shutil.copytree(self.small_model, self.single_model)
        weights = load_file(self.small_model / "model.safetensors")
        single = {name: tensor.float() for name, tensor in weights.items()}
        save_file(single, self.single_model / "model.safetensors")
        config = json.loads((self.small_model / "config.json").read_text())
        write_json(self.single_model / "config.json", config | {"torch_dtype": "float32"})
        return {"bytes": size}

    def run_small(self, name: str, sections: Sections) -> dict[str, Any]:
        """Runs a recipe on the device and on the CPU and compares; both verify the device's artifact."""
        source = self.single_model if name.startswith("float32") else self.small_model
        runs = {}
        for place, device in (("device", self.device), ("cpu", torch.device("cpu"))):
            runs[place] = self.work / f"{name}-{place}"
            recipe = self._recipe(name, source, 8 if self.small else 32, 32 if self.small else 128)
            self._run(recipe | {"evaluate": self._measured(4)} | sections, runs[place], device)
        found = compare(runs["device"], runs["cpu"])
        artifact = runs["device"] / "artifact"
        found["verify"] = {
            "device": verified(artifact, source, self.device),
            "cpu": verified(artifact, source, torch.device("cpu")),
        }
        found["stages"] = stage_rows(runs["device"])
        for folder in runs.values():
            shutil.rmtree(folder)
        return found

    def build_large(self) -> dict[str, Any]:
        """A random checkpoint with the layers of a real model, but fewer of them."""
        return {"bytes": write_checkpoint(self.large_model, self.shape, self.layers, 0, **self.changes)}

    def run_large(self, name: str, sections: Sections) -> dict[str, Any]:
        """Times the stages of a recipe on the device."""
        samples, length = self._large_tokens()
        run = self.work / f"large-{name}"
        self._run(self._recipe(name, self.large_model, samples, length) | sections, run, self.device)
        source, checked = open_checkpoint(self.large_model), verified(run / "artifact", None, self.device)
        model = {
            "shape": self.shape if not self.small else "a tiny model",
            "layers": source.num_layers,
            "of_layers": CONFIGS[self.shape]["num_hidden_layers"],
            "bytes": source.nbytes,
            "tokens": samples * length,
        }
        found = {"model": model, "stages": stage_rows(run), "verify": {"device": checked}}
        shutil.rmtree(run)
        return found

    def profile(self) -> dict[str, Any]:
        """The share of matrix products in the work of one layer of the large model."""
        samples, length = self._large_tokens()
        return product_shares(self.large_model, self.device, min(samples, 16), length, self._group)

    def time_kernels(self) -> dict[str, Any]:
        """Times GPTQ with the plain inner loops and with the fastest ones of the device, on one weight."""
        rows, columns = (64, 256) if self.device.type == "cpu" else (6144, 4096)  # q, k and v of Llama-3-8B
        return compare_kernels(self.device, rows, columns, self._group)

    def usable(self) -> bool:
        """Whether the device still computes."""
        with suppress(Exception):
            torch.ones(2, device=self.device).sum().item()
            return True
        return False

    def reset_peaks(self) -> None:
        """Begins anew to look for the most memory."""
        reset_peak()
        self._stage_peak = self._device_peak = 0
        if self.device.type == "cuda" and self.usable():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peaks(self) -> dict[str, int | None]:
        """The most memory since `reset_peaks`; a run resets the process's own with each stage."""
        device = None
        if self.device.type == "cuda":
            device = max(torch.cuda.max_memory_allocated(self.device), self._device_peak)
        return {"peak_device_bytes": device, "peak_host_bytes": max(peak_bytes(), self._stage_peak)}

    def _run(self, recipe: dict[str, Any], folder: Path, device: torch.device) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # of a process that died
        pipeline.run(Recipe.model_validate(recipe), folder, device, Progress(quiet=True))
        peaks = (row["peak_host_bytes"] for row in stage_rows(folder))
        self._stage_peak = max(self._stage_peak, *peaks)
        on_device = (row["peak_device_bytes"] or 0 for row in stage_rows(folder))
        self._device_peak = max(self._device_peak, *on_device)

    def _recipe(self, name: str, model: Path, samples: int, length: int) -> dict[str, Any]:
        calibration = {"dataset": "builtin", "num_samples": samples, "max_seq_length": length}
        plain = {"version": 1, "name": name, "model": {"path": str(model)}}
        return plain if name.startswith("bitsandbytes") else plain | {"calibration": calibration}

    def _large_tokens(self) -> tuple[int, int]:
        return (8, 32) if self.small else (64, 512)

    def _measured(self, samples: int) -> dict[str, Any]:
        length = 32 if self.small else 128
        return {"perplexity": {"dataset": "builtin", "num_samples": samples, "max_seq_length": length}}


def driver() -> str | None:
    """The version of NVIDIA's driver, where it tells."""
    with suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
        return done.stdout.split()[0]
    return None
