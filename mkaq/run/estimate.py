"""What a stage is expected to need and to make, before anything is done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

    from mkaq.checkpoint.reader import Checkpoint
    from mkaq.walk.activations import Place


@dataclass(frozen=True)
class ModelSize:
    """A model as it is after a stage; `bytes` counts the weights."""

    stage: str
    layers: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Need:
    """Bytes that a stage is expected to need at its peak.

    Attributes:
        device: Of the process, or on the GPU, without the hidden states of all samples.
        states: Of these, wherever they lie.
    """

    device: int
    states: int = 0

    def at(self, place: Place) -> int:
        """Bytes on the device, with hidden states at a place."""
        return self.device + (self.states if place == "device" else 0)


class Estimate(NamedTuple):
    """What a stage is expected to come to, from headers alone.

    Attributes:
        need: Memory.
        after: The model that it makes; None if it makes none.
    """

    need: Need
    after: ModelSize | None = None


@dataclass(frozen=True)
class Task:
    """What a stage is estimated for.

    Attributes:
        source: The model that goes in.
        device: Where layers run.
        dtype: In which dense weights are written.
        samples: Of the calibration, in all.
        length: Tokens of each.
        processes: That share the samples; a need is that of one.
    """

    source: Checkpoint
    device: torch.device
    dtype: torch.dtype
    samples: int
    length: int
    processes: int = 1

    @property
    def own(self) -> int:
        """Samples of one process."""
        return -(-self.samples // self.processes)
