"""The table and the plot of benchmarks/quality.py."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mkaq.files import write_json
from mkaq.report import with_error

RESULTS = Path(__file__).parent / "results"
LABELS = {
    "dense": "dense",
    "dense+distill": "dense + distill",
    "channels+layerwise+distill": "channels + layerwise + distill",
    "channels+layerwise": "channels + layerwise",
    "channels": "channels",
    "sleb+distill": "SLEB + distill",
    "sleb+layerwise": "SLEB + layerwise",
    "sleb": "SLEB",
    "average": "average (MKA)",
    "average-similarity": "average, similarity order",
    "replaceme": "ReplaceMe",
    "laco": "LaCo",
    "contiguous": "contiguous (UIDL)",
    "shortgpt": "ShortGPT",
    "reverse": "reverse order",
}
_COLOURS = "black grey blue C0 C9 orange C1 C3 C2 C8 C4 C5 C6 navy tan"
COLOURS = dict(zip(LABELS, _COLOURS.split(), strict=True))
WIDE = 4  # what has more than so many times the least perplexity lies above the plot
Row = dict[str, Any]


def write_report(record: dict[str, Any], name: str) -> str:
    """Writes the results of a benchmark: .json, .md and .png; returns the table."""
    rows = record["rows"]
    for row in rows:
        for text, measured in row["texts"].items():
            measured["share"] = share(row, rows, text)
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{name}.json", record)
    (RESULTS / f"{name}.md").write_text(table := markdown(record), encoding="utf-8")
    plot(rows).savefig(RESULTS / f"{name}.png", dpi=120)
    return table


def describe(row: Row) -> str:
    """A row in one line."""
    told = ", ".join(f"{name} {perplexity_of(measured)}" for name, measured in row["texts"].items())
    what = f"{LABELS[row['method']]}, {row['removed']} layers removed, {weights(row)}"
    return f"{what}: {told} ({row['bytes'] / 1e6:.1f} MB, {row['seconds']:.0f} s)"


def weights(row: Row) -> str:
    """In what form the weights of the layers are kept."""
    return f"{row['bits']} bits" + ", joint" * row["joint"] if row["bits"] else str(row["dtype"])


def perplexity_of(measured: dict[str, Any]) -> str:
    value = measured["perplexity"]
    return with_error(value, measured["standard_error"], 2 if value < 1000 else 0)


def share(row: Row, rows: list[Row], text: str) -> float | None:
    """What a row loses on a text against the dense model, as a share of what SLEB loses.

    Both have the same number of layers and the same bits. None of the dense model and without SLEB.
    """

    def value(method: str, removed: int, bits: int | None) -> float | None:
        wanted = (method, removed, bits, False)
        found = (r for r in rows if (r["method"], r["removed"], r["bits"], r["joint"]) == wanted)
        return next((r["texts"][text]["perplexity"] for r in found), None)

    dense, sleb = value("dense", 0, None), value("sleb", row["removed"], row["bits"])
    if dense is None or sleb is None or sleb == dense:
        return None
    return float((row["texts"][text]["perplexity"] - dense) / (sleb - dense))


def markdown(record: dict[str, Any]) -> str:
    """The table, with what it was made by and on."""
    rows, texts = record["rows"], list(record["left_out"])
    if not rows:
        return "no rows\n"
    lines = [*introduction(record), "", "| method | layers removed | weights | MB | seconds "]
    lines[-1] += "".join(f"| {text} | share " for text in texts) + "|"
    lines.append("|---" * (5 + 2 * len(texts)) + "|")

    def place(row: Row) -> tuple[int, bool, float]:
        return row["removed"], row["bits"] is not None, row["texts"][texts[0]]["perplexity"]

    for row in sorted(rows, key=place):
        cells = [LABELS[row["method"]], str(row["removed"]), weights(row)]
        cells += [f"{row['bytes'] / 1e6:.1f}", f"{row['seconds']:.0f}"]
        for measured in (row["texts"][text] for text in texts):
            part = measured["share"]
            cells += [perplexity_of(measured), "-" if part is None else f"{part:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"\n{name}: not possible, {reason}." for name, reason in record["failed"].items()]
    return "\n".join(lines) + "\n"


def introduction(record: dict[str, Any]) -> list[str]:
    """What made the table, on what; and what its columns are."""
    model, machine, (samples, length) = record["model"], record["machine"], record["calibration"]
    libraries = record["libraries"]
    lines = [
        f"`{record['command']}`",
        "",
        f"{model['name']}: {model['type']}, {model['layers']} layers x {model['hidden_size']}, "
        f"{model['parameters']:,} parameters; {samples} x {length} calibration tokens.",
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['device']}; torch {libraries['torch']}, transformers {libraries['transformers']}.",
        "",
        "Perplexity per token ± standard error over documents. Seconds are of the whole compression. Share:",
        "(perplexity - dense) / (SLEB's - dense), SLEB with as many layers and the same bits.",
        "",
    ]
    for text, left_out in record["left_out"].items():
        seen = record["rows"][0]["texts"][text]
        note = f" ({left_out} were left out: seen in calibration)" if left_out else ""
        lines.append(
            f"- {text}: {seen['tokens']:,} predicted tokens in {seen['sequences']} sequences of "
            f"{seen['documents']} documents{note}"
        )
    return lines


def plot(rows: list[Row]) -> Figure:
    """Two panels for each text: perplexity against layers removed, and against bytes."""
    texts = list(rows[0]["texts"])
    figure = Figure(figsize=(12, 4.5 * len(texts) + 1), layout="constrained")
    grid = figure.subplots(len(texts), 2, squeeze=False)
    for (left, right), text in zip(grid, texts, strict=True):
        points = [(row, row["texts"][text]["perplexity"]) for row in rows]
        against_layers(left, [(row, value) for row, value in points if not row["bits"]])
        for row, value in points:
            right.plot(row["bytes"] / 1e6, value, marker(row), color=COLOURS[row["method"]])
        left.set(xlabel="layers removed", ylabel=f"perplexity, {text}", title=f"{text}: not quantized")
        right.set(xlabel="MB of weights", ylabel=f"perplexity, {text}", title=f"{text}: all")
        for axes in (left, right):
            values = [value for row, value in points if axes is right or not row["bits"]]
            axes.set_ylim(0.95 * min(values), 1.05 * min(max(values), WIDE * min(values)))
            axes.grid(alpha=0.3, which="both")
    shown = dict.fromkeys(row["method"] for row in rows)
    lines = [Line2D([], [], color=c, label=LABELS[m]) for m, c in COLOURS.items() if m in shown]
    kinds = {marker(row): weights(row) for row in rows}
    lines += [Line2D([], [], color="grey", ls="", marker=m, label=kind) for m, kind in kinds.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=5)
    return figure


def against_layers(axes: Axes, points: list[tuple[Row, float]]) -> None:
    """One line for each method, from the dense model on."""
    dense = [(0, value) for row, value in points if row["method"] == "dense"]
    for method in dict.fromkeys(row["method"] for row, _ in points):
        line = dense + [(r["removed"], v) for r, v in points if r["method"] == method != "dense"]
        axes.plot(*zip(*sorted(line), strict=True), marker="o", color=COLOURS[method])
    axes.xaxis.get_major_locator().set_params(integer=True)


def marker(row: Row) -> str:
    """Of a point: a circle, a square if quantized, a star if quantized toward the source."""
    return "*" if row["joint"] else "s" if row["bits"] else "o"
