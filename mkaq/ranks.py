"""Several processes that share the calibration samples: one on each GPU, as `torchrun` starts them.

Every process walks the same layers with its share of the samples. Sums over tokens (Hessians, Gram
matrices, losses) are added up over all of them, so each comes to the same weights; the first process
alone writes. One process is the case of a group of one, in which nothing is exchanged.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # if imported later, its default arguments keep the group

from mkaq.errors import UsageError


@dataclass(frozen=True)
class Ranks:
    """A process's place in the group.

    Attributes:
        rank: Its number; 0 writes.
        size: The number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's part of `count` things, in their order; parts differ by one at most."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def samples(self, tokens: torch.Tensor, held_out: int = 0) -> torch.Tensor:
        """This process's part of the samples.

        Args:
            tokens: Shape (samples, length).
            held_out: How many of them, the last ones, are held out: every process gets its part of the
                others, and of these.

        Raises:
            UsageError: If there are too few for everyone, or those held out cannot be shared evenly.
        """
        if self.size == 1:
            return tokens
        count = len(tokens)
        uneven = held_out and (held_out % self.size or count % self.size)
        if count < self.size or uneven:
            raise UsageError(
                f"{count} samples cannot be shared by {self.size} processes",
                where="calibration.num_samples",
                fix=f"use a multiple of {8 * self.size}",
            )
        kept = count - held_out
        learn, held = self.share(kept), self.share(held_out)
        return torch.cat([tokens[learn], tokens[kept:][held]])

    def add(self, *tensors: torch.Tensor) -> None:
        """Replaces tensors by their sums over all processes, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def average(self, *tensors: torch.Tensor) -> None:
        """Replaces tensors by their means over all processes, in place."""
        if self.size > 1:
            self.add(*(tensor.div_(self.size) for tensor in tensors))

    def mean(self, value: float) -> float:
        """The mean of a number that each process has measured on as many tokens."""
        if self.size == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64, device=_device())
        dist.all_reduce(total)
        return float(total) / self.size

    def join(self, part: torch.Tensor, count: int) -> torch.Tensor:
        """Puts together what each process has made of its `share` of `count` rows.

        Args:
            part: Shape (rows of the share, ...).
            count: Rows in all.

        Returns:
            Shape (count, ...), the same for every process.
        """
        if self.size == 1:
            return part
        whole = part.new_zeros(count, *part.shape[1:])
        whole[self.share(count)] = part
        dist.all_reduce(whole)
        return whole

    def from_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replaces a tensor by that of the first process, in place, and returns it."""
        if self.size > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def tell(self, flag: bool = False) -> bool:
        """What the first process says."""
        if self.size == 1:
            return flag
        return bool(self.from_first(torch.tensor([int(flag)], device=_device())))

    def wait(self) -> None:
        """Until every process is here."""
        self.tell()


ALONE = Ranks()


def _device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """The group that `torchrun` started, for a `with` block, and this process's device in it.

    Args:
        device: What was asked for; of several GPUs each process takes the one of its local rank.

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
    dist.init_process_group(backend, timeout=timedelta(days=7))  # the first one may write for long
    try:
        yield Ranks(dist.get_rank(), size), device
    finally:
        dist.destroy_process_group()
