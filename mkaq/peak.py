"""The peak memory of a process, since its start or since `reset_peak`."""

import re
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Literal


def reset_peak() -> None:
    """Resets the peak, on Linux only."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def high_water(process: int | Literal["self"]) -> int:
    """The peak resident set of a process in bytes, according to Linux; 0 if it is unknown."""
    with suppress(OSError):
        match = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{process}/status").read_text())
        return int(match[1]) * 1024 if match else 0
    return 0


def peak_bytes() -> int:
    """The peak resident set of this process in bytes."""
    if peak := high_water("self"):
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
