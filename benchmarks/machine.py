"""The machine that a benchmark ran on."""

import os
import platform
import re
from pathlib import Path
from typing import Any

import psutil


def machine(threads: int) -> dict[str, Any]:
    """What the times depend on, without names."""
    path = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.*)", path.read_text()) if path.exists() else None
    return {
        "processor": named[1] if named else platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
    }
