"""How many threads an operation of torch is shared out among."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps torch from sharing out each operation on something small, which costs more than it gains.

    Threads that wait for one another a thousand times a second stand still on a busy machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
