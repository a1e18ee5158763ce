"""The plot of benchmarks/real_model.py."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from benchmarks.quality_report import COLOURS, LABELS, marker, weights

WIDE = 20  # what has more than so many times the least perplexity lies above the plot
AFTER = 4  # bits after layers were removed, and of the source from which their lines start
Row = dict[str, Any]


def plot(rows: list[Row], texts: Sequence[str]) -> Figure:
    """Perplexity of each text, zero-shot tasks and decode speed against bytes; a line is a method."""
    panels = [
        (f"perplexity, {text}", {id(r): r["texts"][text]["perplexity"] for r in rows if text in r["texts"]})
        for text in texts
    ]
    panels.append(
        ("zero-shot, what the source can do, %", {id(r): 100 * r["able"][0] for r in rows if r["able"]})
    )
    panels.append(("decoded tokens/s", {id(r): r["speed"]["decode"] for r in rows if r["speed"]}))
    panels = [(name, values) for name, values in panels if values]
    high = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(13, 5 * high + 1), layout="constrained")
    for axes, (name, values) in zip(figure.subplots(high, 2, squeeze=False).flat, panels, strict=False):
        draw(axes, [(row, values[id(row)]) for row in rows if id(row) in values])
        axes.set(xlabel="MB of weights", ylabel=name)
        if name.startswith("perplexity"):
            lowest, highest = min(values.values()), max(values.values())
            axes.set_yscale("log")
            axes.set_ylim(0.95 * lowest, 1.1 * min(highest, WIDE * lowest))
            for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                axis(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.grid(alpha=0.3, which="both")
    for axes in list(figure.axes)[len(panels) :]:
        axes.remove()
    shown = dict.fromkeys(row["method"] for row in rows)
    names = LABELS | {"dense": "source, and GPTQ alone"}
    handles = [Line2D([], [], color=COLOURS[m], label=names[m]) for m in LABELS if m in shown]
    kinds = {marker(row): "quantized" if row["bits"] else weights(row) for row in rows}
    handles += [Line2D([], [], color="grey", ls="", marker=m, label=kind) for m, kind in kinds.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=5)
    return figure


def draw(axes: Axes, points: list[tuple[Row, float]]) -> None:
    """Lines from the source on, one for each method: of what is not quantized, and dashed of what is."""
    for method in dict.fromkeys(row["method"] for row, _ in points):
        for bits in (None, AFTER):
            line = sorted(
                (row["bytes"] / 1e6, value)
                for row, value in points
                if (row["method"] == method and bool(row["bits"]) == bool(bits))
                or (row["method"] == "dense" and row["bits"] == bits)
            )
            if line:
                axes.plot(*zip(*line, strict=True), "s--" if bits else "o-", color=COLOURS[method])
