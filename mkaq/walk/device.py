"""The device that layers run on, and the dtype they compute in."""

import torch

from mkaq.errors import UsageError
from mkaq.ranks import ALONE, Ranks


def pick_device(name: str) -> torch.device:
    """The device named by `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        UsageError: If it does not exist.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()) or (kind == "cpu" and number):
        raise UsageError(f"{name!r} is not auto, cpu, cuda or cuda:N", where="--device")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"no such device: {torch.cuda.device_count()} CUDA devices here", where=f"--device {name}"
        )
    return torch.device(name)


def compute_dtype(
    stored: torch.dtype, device: torch.device, *, fast: bool = False, ranks: Ranks = ALONE
) -> torch.dtype:
    """The dtype that a walk computes in.

    Args:
        stored: The checkpoint's dtype.
        device: Where layers run.
        fast: Whether speed counts for more than the last digits.
        ranks: The processes; all of them compute in the same dtype.

    Returns:
        On a GPU `stored`. On a CPU float32, or bfloat16 if `fast`, `stored` is bfloat16 and the CPU
        multiplies in it.
    """
    if device.type == "cpu" and not (fast and stored == torch.bfloat16 and ranks.has_fast_bfloat16(device)):
        return torch.float32
    return stored
