"""What a report draws, as PNG."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mkaq.stages.base import Curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def heatmap_png(matrix: npt.NDArray[np.float64]) -> bytes:
    """The similarity of all pairs of layers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis", origin="lower")
    axes.set(xlabel="layer", ylabel="layer", title="NPIB between layers")
    figure.colorbar(image, ax=axes)
    return _png(figure)


def save_heatmap(matrix: npt.NDArray[np.float64], path: Path) -> None:
    """Writes the heatmap to a file."""
    path.write_bytes(heatmap_png(matrix))


def curves_png(curves: Curves) -> bytes:
    """Measurements by step, a line for each kind, and a mark at the step that is kept."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, values in curves.lines.items():
        axes.plot(curves.steps, values, marker=".", label=name)
    axes.axvline(curves.kept, color="gray", linestyle=":", label="kept")
    axes.set(xlabel="step", ylim=(0, None))
    axes.legend()
    return _png(figure)


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
