"""Several processes that share the calibration samples: one per GPU, as `torchrun` starts them.

Every process walks the same layers with its share of the samples. Sums over tokens (Hessians, Gram matrices,
losses) are reduced over all processes, so all of them compute the same weights. Only the first process makes
choices and writes files. A single process is a group of one and exchanges nothing.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # if imported later, its default arguments keep the group

from mkaq.dtypes import has_fast_bfloat16
from mkaq.errors import UsageError


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
    def main(self) -> bool:
        """Whether this process makes the choices and writes."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's slice of `count` items.

        Shares differ by at most one item; with fewer items than processes, the last processes have none.
        """
        return slice(-(-count * self.rank // self.size), -(-count * (self.rank + 1) // self.size))

    def has_fast_bfloat16(self, device: torch.device) -> bool:
        """Whether bfloat16 is fast on the devices of all processes."""
        return has_fast_bfloat16(device) if self.fast_bfloat16 is None else self.fast_bfloat16

    def add(self, *tensors: torch.Tensor) -> None:
        """Replaces tensors by their sums over all processes, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def average(self, count: int, *tensors: torch.Tensor) -> None:
        """Replaces means over this process's `count` items by means over all items, in place."""
        if self.size > 1:
            total = torch.tensor(count, dtype=torch.float64, device=_device())
            dist.all_reduce(total)
            self.add(*(tensor.mul_(count / float(total)) for tensor in tensors))

    def mean(self, value: float, count: int) -> float:
        """The mean over the tokens of all processes, from each one's mean `value` over `count` tokens."""
        if self.size == 1:
            return value
        sums = [value * count if count else 0.0, float(count)]
        total = torch.tensor(sums, dtype=torch.float64, device=_device())
        dist.all_reduce(total)
        return float(total[0] / total[1].clamp(min=1))

    def largest(self, value: float) -> float:
        """The maximum of `value` over all processes."""
        if self.size == 1:
            return value
        largest = torch.tensor(value, dtype=torch.float64, device=_device())
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return float(largest)

    def join(self, part: torch.Tensor, count: int) -> torch.Tensor:
        """Concatenates what each process computed for its `share` of `count` rows.

        Args:
            part: This process's rows, shape (rows, ...).
            count: The number of rows of all processes.

        Returns:
            Shape (count, ...), the same in every process.
        """
        if self.size == 1:
            return part
        whole = part.new_zeros(count, *part.shape[1:])
        whole[self.share(count)] = part
        dist.all_reduce(whole)
        return whole

    def from_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replaces a tensor by the first process's, in place, and returns it."""
        if self.size > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def tell(self, data: Any = None) -> Any:
        """The first process's `data` (plain JSON data), returned by every process.

        Values that processes compute separately can differ in the last bit, and so could choices made from
        them.
        """
        if self.size == 1:
            return data
        raw = torch.frombuffer(bytearray(json.dumps(data).encode()), dtype=torch.uint8).to(_device())
        size = self.from_first(torch.tensor([len(raw)], device=_device()))
        if not self.main:
            raw = torch.empty(int(size), dtype=torch.uint8, device=_device())
        return json.loads(bytes(self.from_first(raw).tolist()))

    def wait(self) -> None:
        """Waits until every process has called this."""
        self.tell()


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
    try:
        ranks = Ranks(dist.get_rank(), size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
        slowest = -ranks.largest(-float(has_fast_bfloat16(device)))
        yield replace(ranks, fast_bfloat16=bool(slowest)), device
    finally:
        dist.destroy_process_group()
