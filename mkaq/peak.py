"""The most memory that a process has used, since its start or since `reset_peak`."""

import re
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Literal


def reset_peak() -> None:
    """Begins anew, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def high_water(process: int | Literal["self"]) -> int:
    """The largest resident set that Linux has seen of a process, in bytes; 0 where it does not tell."""
    with suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{process}/status").read_text())
        return int(found[1]) * 1024 if found else 0
    return 0


def peak_bytes() -> int:
    """The largest resident set of this process, in bytes."""
    if found := high_water("self"):
        return found
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
