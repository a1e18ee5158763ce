"""The parts of a merge record: merges of averages, new layers, and how layers were fused."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mkaq.stages.base import Part, Row


class MergeEntry(Part):
    """One merge of two neighbouring groups, each named by its first layer."""

    into: int
    """The group that stays."""
    from_: int = Field(alias="from")
    """The group that is absorbed."""
    coefficient: float
    """Weight of the group that stays."""
    similarity: float | None
    """NPIB of the two groups, if it was computed."""

    def row(self) -> Row:
        """The merge's row in the report."""
        similarity = "-" if self.similarity is None else f"{self.similarity:.3f}"
        return (str(self.into), str(self.from_), f"{self.coefficient:.3f}", similarity)


class Solved(Part):
    """A weight solved in closed form; errors are fractions of the target's energy, on held-out tokens."""

    ridge: float | None
    """The ridge chosen on held-out tokens; null: no ridge helped and the weight is unchanged."""
    error_before: float
    """Error of the original weight."""
    error: float
    """Error of the final weight."""

    def row(self) -> Row:
        """The ridge and the errors in the report."""
        return str(self.ridge or "left as it was"), f"{self.error_before:.4f} to {self.error:.4f}"


class Fused(Part):
    """How a layer was fused from heads and channels of several layers."""

    origins_sha256: str
    """Digest of the layer's entry in mkaq-origins.json."""
    attention: Solved
    """The fit of `o_proj`."""
    mlp: Solved
    """The fit of `down_proj`."""
    residual: float
    """Mean of |output - original|^2 / |original|^2 over held-out tokens, given the fused layers before it."""


class NewLayer(Part):
    """A layer of the result, and the source layers that it replaces."""

    new: int
    """Its number."""
    from_: dict[Annotated[str, Field(pattern=r"^\d{1,4}$")], float] = Field(alias="from", min_length=1)
    """Old layer and weight. Averaged: summed in this order in float32, cast once. Fused: the fraction of
    channels from that layer; the first layer gives the norms."""
    fused: Fused | None = None
    """How it was fused, if it was."""
    sha256: str
    """Digest over the names and bytes of its merged tensors, in order of name."""

    @property
    def weights(self) -> dict[int, float]:
        """Old layers and their weights or fractions."""
        return {int(old): weight for old, weight in self.from_.items()}

    def line(self) -> str:
        """The layer's line in `mkaq inspect`."""
        if self.fused:
            mix = ", ".join(f"{fraction:.0%} of {old}" for old, fraction in self.from_.items())
            return f"layer {self.new}: channels {mix}; error {self.fused.residual:.4f}"
        terms = (f"{weight:.3f} x {old}" for old, weight in self.from_.items())
        return f"layer {self.new} = " + " + ".join(terms)

    def row(self) -> Row:
        """A fused layer's row in the report."""
        assert self.fused is not None
        fractions = " ".join(f"{old}: {100 * fraction:.0f} %" for old, fraction in self.from_.items())
        solved = (*self.fused.attention.row(), *self.fused.mlp.row())
        return (str(self.new), fractions, *solved, f"{self.fused.residual:.4f}")
