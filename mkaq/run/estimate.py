"""Estimates of a stage's memory and of the model that it makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

    from mkaq.checkpoint.reader import Checkpoint
    from mkaq.walk.activations import Place


@dataclass(frozen=True)
class ModelSize:
    """Size of the model after a stage, and how it was made; `bytes` counts the weights."""

    stage: str
    layers: int
    parameters: int
    bytes: int
    how: str = ""


@dataclass(frozen=True)
class Need:
    """Bytes that a stage is expected to need at its peak.

    Attributes:
        device: Bytes in the process, or on the GPU, without the hidden states of all samples.
        states: Bytes of the hidden states of all samples, wherever they are stored.
    """

    device: int
    states: int = 0

    def at(self, place: Place) -> int:
        """Bytes on the device if hidden states are stored at `place`."""
        return self.device + (self.states if place == "device" else 0)


class Work(NamedTuple):
    """Floating-point operations of one process.

    Attributes:
        exact: In the type of an exact walk.
        fast: In that of a fast one.
    """

    exact: float = 0.0
    fast: float = 0.0


class Estimate(NamedTuple):
    """The estimate of a stage, from headers alone.

    Attributes:
        need: Memory.
        after: The model that it makes; None if it makes none.
        work: What it computes.
    """

    need: Need
    after: ModelSize | None = None
    work: Work = Work()


@dataclass(frozen=True)
class Task:
    """The inputs of a stage's estimate.

    Attributes:
        source: The model to compress.
        device: Where layers run.
        dtype: Type of dense weights on disk.
        samples: Calibration samples in all.
        length: Tokens per sample.
        processes: Processes that share the samples; an estimate is for one of them.
    """

    source: Checkpoint
    device: torch.device
    dtype: torch.dtype
    samples: int
    length: int
    processes: int = 1

    @property
    def own(self) -> int:
        """Number of samples of one process."""
        return -(-self.samples // self.processes)
