"""What benchmarks/speed.py writes: the table of its results."""

from typing import Any


def describe(row: dict[str, Any]) -> str:
    found = ", ".join(f"{name} {text['perplexity']:.3f}" for name, text in row["texts"].items())
    return f"{row['product']}: {row['seconds']:.1f} s, {row['peak_bytes'] / 1e9:.2f} GB, perplexity {found}"


def table(record: dict[str, Any]) -> str:
    """The results in Markdown."""
    here, settings, rows = record["machine"], record["settings"], record["rows"]
    count, length = record["calibration"]["tokens"]
    names = list(record["texts"])
    tokens = ", ".join(f"{rows[0]['texts'][name]['tokens']:,} tokens of {name}" for name in names)
    repeats, calibrating = len(rows[1]["runs"]), rows[1]["told"]["stages"]["calibrate"]
    head = ["product", "whole process, s", "quantizing, s", "peak, GB", "weights, MB"]
    order = (
        "falling activation first (GPTQModel: within groups)"
        if settings["act_order"]
        else "no activation order"
    )
    lines = [
        f"`{record['command']}`: {record['model']['name']}, 4 bits, symmetric, group size "
        f"{settings['group_size']}, {order}, damping 0.01, the same {count} x {length} calibration tokens, "
        f"{record['calibration']['rows_at_once']} rows at a time. {here['processor']}, cores: "
        f"{here['cores']}, threads: {here['threads']}. Medians of {repeats} runs, "
        f"least and most in parentheses. Perplexity over {tokens}.",
        "",
        f"| {' | '.join(head + [f'perplexity {name}' for name in names])} |",
        "|---" * (len(head) + len(names)) + "|",
    ]
    for row in rows:
        cells = [row["product"], *(spread(row, key, 1) for key in ("seconds", "quantize"))]
        cells += [spread(row, "peak_bytes", 1e9), f"{row['bytes'] / 1e6:.2f}"]
        cells += [f"{row['texts'][name]['perplexity']:.3f}" for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Quantizing: for mkaq the stage as run.json has it, which reads the model and writes the checkpoint "
        "as it goes; for the others what lies between loading and saving. The whole process of mkaq also "
        f"reads and tokenizes the calibration text ({calibrating:.1f} s), which the others get as tokens. "
        "Peak: all processes of a run together. Where nothing else is said a product keeps its own defaults, "
        "such as how it chooses scales.",
        "",
    ]
    lines += [f"- {row['product']}: {row['settings']}; {versions(row, record)}" for row in rows[1:]]
    lines += [f"- {name}: left out, no Python with it was given" for name in record["left_out"]]
    return "\n".join(lines) + "\n"


def spread(row: dict[str, Any], key: str, unit: float) -> str:
    if "runs" not in row:
        return "-"
    values, digits = [run[key] / unit for run in row["runs"]], 2 if unit > 1 else 1
    return f"{row[key] / unit:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def versions(row: dict[str, Any], record: dict[str, Any]) -> str:
    ours = {name: record["libraries"][name] for name in ("mkaq", "torch", "transformers", "bitsandbytes")}
    return ", ".join(f"{name} {number}" for name, number in row["told"].get("versions", ours).items())
