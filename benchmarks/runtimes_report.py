"""The table of benchmarks/runtimes.py."""

from typing import Any

Row = dict[str, Any]


def report(data: dict[str, Any]) -> str:
    """Markdown: per runtime and format a table of settings; then what was said of those that do not load."""
    lines = [
        f"Printed by `python -m benchmarks.runtimes`: {data['model']} on a CPU. *difference* is the mean",
        "difference of a token's log-probability from that of the decoded weights in float32. *same*: of",
        "three greedy continuations of at most 32 tokens the number that are the same as those weights';",
        "*gap*: where they first differ, what lies between the logits of the two tokens, at most.",
        *_noise(data["rows"]),
        "*tokens/s* beside other work, the first costs included; not to be compared.",
        "",
        f"Left out, for want of an environment: {', '.join(data['left_out']) or 'nothing'}.",
    ]
    kinds = dict[tuple[str | None, ...], list[Row]]()
    for row in data["rows"]:
        kinds.setdefault((row["runtime"], row["format"], row.get("dtype")), []).append(row)
    for (runtime, kind, dtype), rows in kinds.items():
        lines += ["", f"## {kind} in {runtime}" + f", in {dtype}" * bool(dtype), ""]
        lines += [
            "| bits | sym | group | desc_act | head | loads | agrees | difference | same | gap | tokens/s |",
            "|" + "---|" * 11,
        ]
        lines += [_line(row) for row in rows]
        errors = dict.fromkeys(row["error"] for row in rows if "error" in row)
        lines += ["", *(f"- {error[:300]}" for error in errors)] if errors else []
    return "\n".join(lines) + "\n"


def _noise(rows: list[Row]) -> list[str]:
    found = [row["bfloat16_difference"] for row in rows if "bfloat16_difference" in row]
    if not found:  # all rows are of before that was measured
        return []
    return [f"bfloat16 makes a difference of {min(found):.4f} to {max(found):.4f} of the same weights."]


def _line(row: Row) -> str:
    settings = [str(row.get(key, "")) for key in ("bits", "sym", "group_size", "desc_act", "lm_head")]
    if not row["loads"]:
        return f"| {' | '.join(settings)} | no | | | | | |"
    same = " | "  # of rows that were made before prompts were continued
    if gaps := row.get("gaps"):
        same = f"{sum(gap == 0 for gap in gaps)} of {len(gaps)} | {max(gaps):.4f}"
    numbers = f"{row['difference']:.4f} | {same} | {row['tokens_per_second']:.0f}"
    return f"| {' | '.join(settings)} | yes | {'yes' if row['agrees'] else 'NO'} | {numbers} |"
