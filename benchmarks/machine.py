"""The machine that a benchmark ran on."""

import os
import platform
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import psutil
import torch


def machine(threads: int) -> dict[str, Any]:
    """What the times depend on, without names."""
    return {
        "processor": processor(torch.device("cpu")),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
    }


def processor(device: torch.device) -> str:
    """What computes there."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.*)", path.read_text()) if path.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


def command_line(module: str) -> str:
    """What this process was started with, a module here, without this machine's paths."""
    return shlex.join(["python", "-m", f"benchmarks.{module}", *map(without_folder, sys.argv[1:])])


def without_folder(value: Any) -> Any:
    """An argument with the name instead of an absolute path."""
    if isinstance(value, list):
        return [without_folder(item) for item in value]
    before, equals, path = value.rpartition("=") if isinstance(value, str) else ("", "", "")
    return f"{before}{equals}{Path(path).name}" if Path(path).is_absolute() else value
