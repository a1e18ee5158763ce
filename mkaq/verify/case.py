"""The claims of a manifest's steps, collected in order and then compared with the artifact."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mkaq.checkpoint.reader import Checkpoint
from mkaq.errors import VerificationError
from mkaq.fit.final_norm import scaled_norm
from mkaq.fit.hold_out import Samples
from mkaq.formats.layer import dense_layer
from mkaq.merge.write import digest_layer
from mkaq.progress import Progress
from mkaq.quantize.weight_error import relative_error
from mkaq.verify.known import KnownLayer, untouched
from mkaq.walk.walk import LayerWalk

if TYPE_CHECKING:
    from mkaq.stages.base import FinalNorm
    from mkaq.stages.quantize import QuantizedModule
    from mkaq.verify.remeasure import Tolerance

_RELATIVE_TOLERANCE = 1e-6
Measure = Callable[[LayerWalk, LayerWalk, Samples, "Tolerance"], Iterator[str]]
"""Measures recorded errors again, over the source and the artifact; yields the claims that do not hold."""


def raise_faults(where: Path, faults: list[str]) -> None:
    """Raises a VerificationError that lists the faults, if there are any."""
    if faults:
        raise VerificationError("; ".join(faults), where=where, fix="make or download it again")


class Case:
    """The combined claims of a manifest's steps.

    Args:
        artifact: The artifact.
        source: The model that it was made from.

    Attributes:
        dtype: Type of the dense tensors.
        layers: The expected tensors of each layer; None if none follow from the record.
        groups: For each layer, the source layers that it replaces.
        modules: The records of quantized linear layers, by name.
        measure: Measures the errors that the last step recorded; None if all weights follow from the source.
        said: What was measured again, in one sentence, where it is not the errors of hidden states.
        recomputed: A phrase for the layers that are recomputed; empty if there are none.
    """

    def __init__(self, artifact: Checkpoint, source: Checkpoint) -> None:
        self.artifact, self.source, self.dtype = artifact, source, artifact.dtype
        count = source.num_layers
        self.layers: Iterator[KnownLayer] | None = untouched(source, self.dtype)
        self.groups = [[index] for index in range(count)]
        self.modules: Mapping[str, QuantizedModule] = {}
        self.measure: Measure | None = None
        self.recomputed = self.said = ""
        self._scales: list[float] = []
        self._faults: list[str] = []

    def merged(
        self, layers: Iterator[KnownLayer], groups: list[list[int]], dtype: torch.dtype, recomputed: str
    ) -> None:
        """Sets the layers that follow from those of the source."""
        self.layers, self.groups, self.dtype, self.recomputed = layers, groups, dtype, recomputed

    def unknown(self) -> None:
        """Declares that no layer follows from the records any more."""
        self.layers, self.recomputed = None, ""

    def demand(self, faults: Iterable[str]) -> None:
        """Raises at once if a claim that other checks depend on does not hold.

        Raises:
            VerificationError: With the faults, if there are any.
        """
        raise_faults(self.artifact.path, list(faults))

    def fault(self, faults: Iterable[str]) -> None:
        """Adds claims that do not hold, reported later with all others."""
        self._faults += faults

    def scale(self, norm: "FinalNorm | None") -> None:
        """Adds a factor of the final norm, applied after the earlier ones."""
        if norm is not None:
            self._scales.append(norm.scale)

    def compare(self, progress: Progress) -> list[str]:
        """Compares the artifact with all collected claims.

        Returns:
            One sentence for each check.

        Raises:
            VerificationError: With every claim that does not hold.
        """
        faults, checks = [*self._outer_faults(), *self._faults], []
        if self.layers is not None:
            faults += self._solved_faults()
            count = 0
            for new, known in enumerate(progress.track(self.layers, "verify", len(self.groups))):
                faults += self._layer_faults(new, known)
                weights = [name for name in known.tensors if name.endswith(".weight")]
                count += sum(_is_rounded(self.modules.get(self._module(new, name))) for name in weights)
            if self.recomputed:
                checks.append(f"{self.recomputed} recomputed from the source, bit for bit")
            if self.modules:
                checks.append(f"{count} quantized modules have the weight error that the manifest says")
        raise_faults(self.artifact.path, faults)
        return checks

    def _outer_faults(self) -> Iterator[str]:
        """Yields the faults of the tensors outside the layers."""
        arch = self.source.arch
        for name, tensor in self.source.each(self.source.outer_tensor_names):
            if name == arch.head_weight and self.artifact.quantizes_head:
                yield from self._head_faults(tensor.to(self.dtype))
                continue
            expected = tensor
            for scale in self._scales if name == arch.final_norm_weight else ():
                expected = scaled_norm(expected, scale, arch.norm_offset, self.dtype)
            if not torch.equal(expected.to(self.dtype), self.artifact.read([name])[name]):
                yield f"{name} is not the source's" + (", rescaled" if expected is not tensor else "")

    def _head_faults(self, weight: torch.Tensor) -> Iterator[str]:
        """Yields a fault if the quantized output layer has another error than recorded."""
        if module := self.modules.get(self.source.arch.head):
            yield from _error_faults(module, relative_error(weight, self.artifact.quantized_head()))

    def _solved_faults(self) -> Iterator[str]:
        writers = tuple(f".{name}" for name in self.source.arch.out_projs)
        for name, module in self.modules.items():
            if not _is_rounded(module) and not name.endswith(writers):
                yield f"{name} is said to be solved, and writes no hidden state"

    def _layer_faults(self, new: int, known: KnownLayer) -> Iterator[str]:
        """Yields the faults of a layer of the artifact."""
        arch, stored = self.artifact.arch, self.artifact.read_layer(new)
        present = dense_layer(stored, arch.linear_names, self.artifact.quantization)
        whole = known.tensors if known.whole else stored
        recorded = known.sha256 if known.whole or not self.modules else None
        if recorded and digest_layer(whole) != recorded:
            yield f"layer {new} has another digest than the manifest says"
        for name, tensor in known.tensors.items():
            module = self.modules.get(self._module(new, name)) if name.endswith(".weight") else None
            if module is not None:
                if _is_rounded(module):
                    yield from _error_faults(module, relative_error(tensor, present[name]))
            elif not torch.equal(tensor, present[name]):
                yield f"{arch.in_layer(new, name)} is not what the recorded merge gives"

    def _module(self, new: int, name: str) -> str:
        return self.source.arch.in_layer(new, name.removesuffix(".weight"))


def _error_faults(module: "QuantizedModule", actual: float) -> Iterator[str]:
    """Yields a fault if a module's weight error is not the recorded one."""
    if not math.isclose(actual, module.weight_error, rel_tol=_RELATIVE_TOLERANCE, abs_tol=1e-12):
        yield (
            f"{module.name} has a weight error of {actual:.6g}, the manifest says {module.weight_error:.6g}"
        )


def _is_rounded(module: "QuantizedModule | None") -> bool:
    """Whether the module was rounded from the merged model's own weight, not from one solved for it."""
    return module is not None and module.ridge is None
