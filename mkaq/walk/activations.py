"""Hidden states of all calibration samples: on the device, in its host's memory, or in files."""

import mmap
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Literal

import torch

Place = Literal["device", "host", "files"]


class Activations:
    """Makes tensors for hidden states.

    What lies in a file counts as memory only while it is used: `release` gives the pages back to the
    system's cache, from which they return when they are read.

    Args:
        device: Where layers run.
        place: Where hidden states lie. `host` is pinned memory, from which a GPU reads fast.
        folder: Where files go, each without a name, so that none is left behind.
    """

    def __init__(self, device: torch.device, place: Place = "device", folder: Path | None = None) -> None:
        self._home = device if place == "device" else torch.device("cpu")
        self._pinned = place == "host" and device.type == "cuda"
        self._folder = folder if place == "files" else None
        self._maps: list[mmap.mmap] = []
        self._spare: defaultdict[tuple[object, ...], list[torch.Tensor]] = defaultdict(list)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor with room for hidden states, shape (samples, length, features)."""
        if spare := self._spare[*shape, dtype]:
            return spare.pop()
        size = torch.Size(shape).numel() * dtype.itemsize
        if self._folder is None or size == 0:
            return torch.empty(shape, dtype=dtype, device=self._home, pin_memory=self._pinned)
        with tempfile.TemporaryFile(dir=self._folder) as file:
            file.truncate(size)
            self._maps.append(mmap.mmap(file.fileno(), size))
        return torch.frombuffer(self._maps[-1], dtype=dtype).reshape(shape)

    def empty_like(self, states: torch.Tensor) -> torch.Tensor:
        """A tensor with room for as many hidden states of the same type."""
        return self.empty(tuple(states.shape), states.dtype)

    def copy(self, states: torch.Tensor) -> torch.Tensor:
        """Hidden states once more, on their own."""
        copied = self.empty_like(states)
        self.overwrite(copied, states)
        return copied

    def overwrite(self, states: torch.Tensor, values: torch.Tensor) -> None:
        """Gives hidden states other values, with few of either in memory at a time."""
        for place, sample in zip(states, values, strict=True):
            place.copy_(sample)
            self.release()

    def give_back(self, tensor: torch.Tensor) -> None:
        """Lets the next `empty` of its shape and type have a tensor that is not needed any more.

        New pages are cleared by the system, which takes longer than what is done with most of them.
        """
        self._spare[*tensor.shape, tensor.dtype].append(tensor)

    def release(self) -> None:
        """Lets go of the memory of what lies in files; its contents stay."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)
