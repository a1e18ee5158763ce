"""One of two processes of a run; it kills itself at the n-th exchange with the other.

usage: RANK=... python -m tests.reliability.process VICTIM N mkaq-arguments...
"""

import os
import signal
import sys
from typing import Any

import torch
import torch.distributed as dist

from mkaq.cli import main


def die_at(victim: int, at: int) -> None:
    """Lets a process end at an exchange, if it is this one; counts them from 1."""
    calls = 0

    def counted(exchange: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at and os.environ["RANK"] == str(victim):
                os.kill(os.getpid(), signal.SIGKILL)
            return exchange(*arguments, **options)

        return call

    for name in ("all_reduce", "broadcast"):
        setattr(dist, name, counted(getattr(dist, name)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    die_at(int(sys.argv[1]), int(sys.argv[2]))
    sys.argv[1:3] = []
    main()
