"""Estimates of a stage's memory and of the model that it makes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
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
        beside: Bytes more, if they are on the device: what else is then kept there.
    """

    device: int
    states: int = 0
    beside: int = 0

    def at(self, place: Place) -> int:
        """Bytes on the device if hidden states are stored at `place`."""
        return self.device + (self.states + self.beside if place == "device" else 0)


@dataclass(frozen=True)
class Work:
    """What one process computes, by kind; `rates.Rehearsal` times each kind on this machine.

    Attributes:
        exact: Tokens through one layer, in an exact walk.
        fast: Tokens through one layer, in a fast walk.
        tuned: Tokens through one layer and back.
        logits: Tokens through the head, with the logarithm of their probabilities.
        products: Floating-point operations of products in float32.
        factors: Those of Cholesky factors in float32.
        stepped: Weights that the optimizer changes.
        rounded: Weights rounded by GPTQ, beside the products.
        coded: Weights that bitsandbytes quantizes.
        written: Bytes hashed and written to the run's folder.
    """

    exact: float = 0.0
    fast: float = 0.0
    tuned: float = 0.0
    logits: float = 0.0
    products: float = 0.0
    factors: float = 0.0
    stepped: float = 0.0
    rounded: float = 0.0
    coded: float = 0.0
    written: float = 0.0

    def __add__(self, other: Work) -> Work:
        """The work of both."""
        return Work(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))

    def operations(self, weights: int) -> float:
        """About the floating-point operations, in layers of so many weights; the head's are left out."""
        tokens = self.exact + self.fast + 3 * self.tuned
        return 2 * weights * tokens + self.products + self.factors + 100 * (self.rounded + self.coded)

    @staticmethod
    def largest(works: Iterable[Work]) -> Work:
        """The most of each kind."""
        return Work(*map(max, zip(*map(astuple, works), strict=True)))

    def __mul__(self, times: float) -> Work:
        """The work, so many times."""
        return Work(*(times * each for each in astuple(self)))


class Estimate(NamedTuple):
    """The estimate of a stage, from headers alone.

    Attributes:
        need: Memory.
        after: The model that it makes; None if it makes none.
        work: What it computes.
        kept: Bytes on disk of the parts that it has finished, which a long stage keeps until it is published.
        files: Bytes that it writes beside a model.
        apart: What it computes too, if the device does not hold what `need` says.
    """

    need: Need
    after: ModelSize | None = None
    work: Work = Work()
    kept: int = 0
    files: int = 0
    apart: Work = Work()


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
