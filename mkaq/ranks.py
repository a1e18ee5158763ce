"""Several processes that share the calibration samples: one per GPU, as `torchrun` starts them.

Every process walks the same layers with its share of the samples. Sums over tokens (Hessians, Gram matrices,
losses) are reduced over all processes, so all of them compute the same weights. Only the first process makes
choices and writes files. A single process is a group of one and exchanges nothing.
"""

import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any
from zlib import crc32

import psutil
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # if imported later, its default arguments keep the group

from mkaq.dtypes import has_fast_bfloat16
from mkaq.errors import Interrupted, UsageError

_LAST_BREATH = 5.0  # seconds from the end of a process's connections to its own


@dataclass(frozen=True)
class Ranks:
    """A process's rank in the group.

    Attributes:
        rank: Its number; rank 0 writes.
        size: The number of processes.
        local_size: The number of processes on this machine.
        fast_bfloat16: Whether bfloat16 is fast on the devices of all processes; None if not yet known.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
    fast_bfloat16: bool | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process makes the choices and writes."""
        return self.rank == 0

    def slice_of(self, count: int) -> slice:
        """This process's slice of `count` items.

        Shares differ by at most one item; with fewer items than processes, the last processes have none.
        """
        return slice(-(-count * self.rank // self.size), -(-count * (self.rank + 1) // self.size))

    def has_fast_bfloat16(self, device: torch.device) -> bool:
        """Whether bfloat16 is fast on the devices of all processes."""
        return has_fast_bfloat16(device) if self.fast_bfloat16 is None else self.fast_bfloat16

    def all_reduce(self, *tensors: torch.Tensor) -> None:
        """Replaces tensors by their sums over all processes, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def average(self, count: int, *tensors: torch.Tensor) -> None:
        """Replaces means over this process's `count` items by means over all items, in place; 0 of none."""
        if self.size > 1:
            total = torch.tensor(count, dtype=torch.float64, device=_device())
            dist.all_reduce(total)
            share = count / max(1.0, float(total))
            self.all_reduce(*(tensor.mul_(share) for tensor in tensors))

    def mean(self, value: float, count: int) -> float:
        """The mean over the tokens of all processes, from each one's mean `value` over `count` tokens."""
        if self.size == 1:
            return value
        sums = [value * count if count else 0.0, float(count)]
        total = torch.tensor(sums, dtype=torch.float64, device=_device())
        dist.all_reduce(total)
        return float(total[0] / total[1].clamp(min=1))

    def maximum(self, value: float) -> float:
        """The maximum of `value` over all processes."""
        if self.size == 1:
            return value
        largest = torch.tensor(value, dtype=torch.float64, device=_device())
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return float(largest)

    def gather(self, part: torch.Tensor, count: int) -> torch.Tensor:
        """Concatenates what each process computed for its `slice_of` of `count` rows.

        Args:
            part: This process's rows, shape (rows, ...).
            count: The number of rows of all processes.

        Returns:
            Shape (count, ...), the same in every process.
        """
        if self.size == 1:
            return part
        whole = torch.zeros(count, *part.shape[1:], dtype=part.dtype, device=_device())
        whole[self.slice_of(count)] = part.to(whole.device)
        dist.all_reduce(whole)
        return whole.to(part.device)

    def broadcast_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replaces a tensor by the first process's, in place, and returns it."""
        if self.size > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def broadcast(self, data: Any = None) -> Any:
        """The first process's `data` (plain JSON data), returned by every process.

        Values that processes compute separately can differ in the last bit, and so could choices made from
        them.
        """
        if self.size == 1:
            return data
        raw = torch.frombuffer(bytearray(json.dumps(data).encode()), dtype=torch.uint8).to(_device())
        size = self.broadcast_tensor(torch.tensor([len(raw)], device=_device()))
        if not self.is_main:
            raw = torch.empty(int(size), dtype=torch.uint8, device=_device())
        return json.loads(bytes(self.broadcast_tensor(raw).tolist()))

    def barrier(self) -> None:
        """Waits until every process has called this."""
        self.broadcast()


ALONE = Ranks()


def _device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """The process group that `torchrun` started, for a `with` block, and this process's device in it.

    Args:
        device: The device requested; with several GPUs each process takes that of its local rank.

    Raises:
        UsageError: If there are more processes than GPUs on this machine.
        Interrupted: If another process ends before this one; it is named if it was on this machine.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE, device
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UsageError(
                f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}",
                where="torchrun",
                fix="lower --nproc-per-node",
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=7))  # the first process may write for a long time
    members: list[tuple[int, int]] = []
    try:
        ranks = Ranks(dist.get_rank(), size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
        members = _members(ranks)
        slowest = -ranks.maximum(-float(has_fast_bfloat16(device)))
        yield replace(ranks, fast_bfloat16=bool(slowest)), device
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        fix = "see what it said; all processes started again resume the run"
        raise Interrupted(f"{_gone(members)} has ended, and this one cannot go on", fix=fix) from error
    finally:
        dist.destroy_process_group()


def _machine() -> int:
    return crc32(socket.gethostname().encode())


def _members(ranks: Ranks) -> list[tuple[int, int]]:
    """Machine and process id of every process, by rank."""
    table = torch.zeros(ranks.size, 2, dtype=torch.int64, device=_device())
    table[ranks.rank, 0], table[ranks.rank, 1] = _machine(), os.getpid()
    dist.all_reduce(table)
    return [(machine, process) for machine, process in table.tolist()]


def _gone(members: Sequence[tuple[int, int]]) -> str:
    """The processes of this machine that have ended.

    A process's connections close before the system says that it has ended, so this waits a little.
    """
    here = [(rank, process) for rank, (machine, process) in enumerate(members) if machine == _machine()]
    until = time.monotonic() + _LAST_BREATH
    while True:
        gone = [f"process {rank} (pid {process})" for rank, process in here if _ended(process)]
        if gone or len(here) < 2 or time.monotonic() > until:
            return ", ".join(gone) or "another process"
        time.sleep(0.1)


def _ended(process: int) -> bool:
    try:
        return psutil.Process(process).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True
