"""Where layers run, and in which type."""

import torch

from mkaq.errors import UsageError
from mkaq.ranks import ALONE, Ranks


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device that is there.

    Raises:
        UsageError: If it is not.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()) or (kind == "cpu" and number):
        raise UsageError(f"{name!r} is not auto, cpu, cuda or cuda:N", where="--device")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"no such device: {torch.cuda.device_count()} CUDA devices here", where=f"--device {name}"
        )
    return torch.device(name)


def compute_dtype(
    stored: torch.dtype, device: torch.device, *, fast: bool = False, ranks: Ranks = ALONE
) -> torch.dtype:
    """The type that a walk computes in.

    Args:
        stored: Of the checkpoint.
        device: Where layers run.
        fast: Speed counts for more than the last digits.
        ranks: The processes, all of which compute in it.

    Returns:
        On a GPU the checkpoint's own; on a CPU float32, or bfloat16 if that is the checkpoint's own and
        the CPU multiplies in it.
    """
    if device.type == "cpu" and not (fast and stored == torch.bfloat16 and ranks.has_fast_bfloat16(device)):
        return torch.float32
    return stored
