"""Hidden states of all calibration samples: on the device, in host memory, or in files."""

import mmap
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Literal, get_args

import torch

Place = Literal["device", "host", "files"]
PLACES: tuple[Place, ...] = get_args(Place)


class Activations:
    """Makes tensors for hidden states.

    Tensors in files count as memory only while they are used: `release` returns their pages to the system's
    cache, from which they are read again.

    Args:
        device: Where layers run.
        place: Where hidden states lie. `host` is pinned memory, which a GPU reads fast.
        folder: Where the files lie. They have no names, so none is left behind.
    """

    def __init__(self, device: torch.device, place: Place = "device", folder: Path | None = None) -> None:
        self._home = device if place == "device" else torch.device("cpu")
        self._pinned = place == "host" and device.type == "cuda"
        self._folder = folder if place == "files" else None
        self._maps: list[mmap.mmap] = []
        self._spare: defaultdict[tuple[object, ...], list[torch.Tensor]] = defaultdict(list)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialized tensor, shape (samples, length, features)."""
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
        """An uninitialized tensor of the same shape and dtype."""
        return self.empty(tuple(states.shape), states.dtype)

    def copy(self, states: torch.Tensor) -> torch.Tensor:
        """A copy of hidden states."""
        copy = self.empty_like(states)
        self.overwrite(copy, states)
        return copy

    def overwrite(self, states: torch.Tensor, values: torch.Tensor) -> None:
        """Overwrites hidden states sample by sample, so that few of them are in memory at a time."""
        for state, value in zip(states, values, strict=True):
            state.copy_(value)
            self.release()

    def recycle(self, tensor: torch.Tensor) -> None:
        """Keeps a tensor that is no longer needed for the next `empty` with its shape and dtype.

        The system clears new pages, which takes longer than most of the work on them.
        """
        self._spare[*tensor.shape, tensor.dtype].append(tensor)

    def release(self) -> None:
        """Releases the memory of tensors in files; their contents stay."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)
