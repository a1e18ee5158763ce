"""The tables of benchmarks/real_model.py."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.quality_report import LABELS, RESULTS, perplexity_of, share, weights
from benchmarks.real_plot import plot
from benchmarks.real_tasks import IFEVAL
from mkaq.distill.gate import Check, best_check
from mkaq.files import write_json
from mkaq.report import with_error

Row = dict[str, Any]


def write_report(record: dict[str, Any], name: str, folder: Path = RESULTS) -> str:
    """Writes the results: .json, .md and .png; returns the tables.

    Args:
        record: What the benchmark tells; its rows are completed in place.
        name: Of the files.
        folder: Where they go; made if it is not there.
    """
    rows = record["rows"]
    complete(rows, record["tasks"])
    folder.mkdir(exist_ok=True)
    write_json(folder / f"{name}.json", record | {"rows": [saved(row) for row in rows]})
    (folder / f"{name}.md").write_text(table := markdown(record), encoding="utf-8")
    if rows:
        plot(rows, list(record["left_out"])).savefig(folder / f"{name}.png", dpi=120)
    return table


def saved(row: Row) -> Row:
    """A row with the scores of each task's items as one text of digits, not as a line each."""
    tasks = {name: task | {"items": "".join(map(str, task["items"]))} for name, task in row["tasks"].items()}
    return row | {"tasks": tasks}


def complete(rows: list[Row], tasks: dict[str, Any]) -> None:
    """Adds to the rows what follows from all of them: shares of SLEB's loss, and averages of the tasks.

    `tasks` is told which of them the source is `able` to do.
    """
    source = next((row for row in rows if row["method"] == "dense" and not row["bits"]), None)
    for row in rows:
        for text, measured in row["texts"].items():
            measured["share"] = share(row, [other for other in rows if text in other["texts"]], text)
        for task in row["tasks"].values():
            task["accuracy"], task["standard_error"] = mean_of([task["items"]])
    tasks["able"] = able(source, tasks["guessing"]) if source else []
    for row in rows:
        row["zero_shot"], row["able"] = average(row, tasks["zero_shot"]), average(row, tasks["able"])
        row["change"] = None
        if row["zero_shot"] and source and source is not row and source["zero_shot"]:
            scores, before = (
                [of["tasks"][task]["items"] for task in tasks["zero_shot"]] for of in (row, source)
            )
            row["change"] = mean_of(differences(scores, before))


def able(source: Row, guessing: dict[str, float]) -> list[str]:
    """The tasks on which the source is two standard errors or more above the best constant answer.

    What it cannot do itself, its compressed forms cannot lose: they score what their bias happens to be.
    """
    found = {task: source["tasks"][task] for task in guessing if task in source["tasks"]}
    return [
        task
        for task, score in found.items()
        if score["accuracy"] >= guessing[task] + 2 * score["standard_error"]
    ]


def average(row: Row, tasks: Sequence[str]) -> tuple[float, float] | None:
    """The mean accuracy of all these tasks and its standard error; None if one is missing."""
    if not tasks or any(task not in row["tasks"] for task in tasks):
        return None
    return mean_of([row["tasks"][task]["items"] for task in tasks])


def mean_of(scores: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The mean over tasks of their mean scores, and its standard error over items."""
    means = [fmean(task) for task in scores]
    spreads = [
        sum((score - mean) ** 2 for score in task) / max(1, len(task) - 1) / len(task)
        for task, mean in zip(scores, means, strict=True)
    ]
    return fmean(means), math.sqrt(sum(spreads)) / len(scores)


def differences(scores: Sequence[Sequence[int]], before: Sequence[Sequence[int]]) -> list[list[int]]:
    """What changed in each item of each task."""
    return [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(scores, before, strict=True)]


def label(row: Row) -> str:
    """What a method is called."""
    if row["method"] == "dense":
        return "GPTQ alone" if row["bits"] else "source"
    return LABELS[row["method"]]


def describe(row: Row) -> str:
    """A row in one line, with the seconds that it took."""
    told = [f"{name} {perplexity_of(measured)}" for name, measured in row["texts"].items()]
    told += [f"{name} {100 * fmean(task['items']):.1f}%" for name, task in row["tasks"].items()]
    if speed := row["speed"]:
        told.append(f"{speed['decode']:.1f} tokens/s")
    parts = [*row["texts"].values(), *row["tasks"].values(), *([speed] if speed else [])]
    spent = sum(part["measured_in"] for part in parts)
    what = f"{label(row)}, {row['removed']} layers removed, {weights(row)}, {row['bytes'] / 1e6:.1f} MB"
    return f"{what}: {', '.join(told)} (made in {row['seconds']:.0f} s, measured in {spent:.0f} s)"


def percent(value: tuple[float, float] | None, sign: str = "") -> str:
    """A share and its standard error in percent, or a dash."""
    return f"{100 * value[0]:{sign}.1f} ± {100 * value[1]:.1f}" if value else "-"


def text_cells(row: Row, texts: Sequence[str]) -> list[str]:
    """Perplexity, share of SLEB's loss and KL of each text."""
    cells = []
    for text in texts:
        if not (measured := row["texts"].get(text)):
            cells += ["-"] * 3
            continue
        part, away = measured["share"], measured.get("kl")
        cells += [perplexity_of(measured), "-" if part is None else f"{part:.2f}"]
        cells.append("-" if away is None else with_error(away, measured["kl_error"], 4))
    return cells


def speed_cells(row: Row) -> list[str]:
    """Tokens per second: prefill and decode."""
    speed = row["speed"]
    return [f"{speed['prefill']:.0f}", f"{speed['decode']:.1f}"] if speed else ["-", "-"]


def task_cells(row: Row, zero_shot: Sequence[str], generates: bool) -> list[str]:
    """The zero-shot averages, what was lost, and IFEval."""
    keys = ("zero_shot", ""), ("change", "+"), ("able", "")
    cells = [percent(row[key], sign) for key, sign in keys] if zero_shot else []
    if generates:
        found = row["tasks"].get(IFEVAL)
        cells.append(percent((found["accuracy"], found["standard_error"])) if found else "-")
        cells.append(f"{100 * found['instructions']:.1f}" if found else "-")
    return cells


def markdown(record: dict[str, Any]) -> str:
    """The tables, with what they were made by and on."""
    rows, texts, zero_shot = record["rows"], list(record["left_out"]), record["tasks"]["zero_shot"]
    if not rows:
        return "no rows\n"
    generates = any(IFEVAL in row["tasks"] for row in rows)
    columns = ["method", "layers removed", "weights", "MB", "prefill", "decode"]
    columns += [column for text in texts for column in (text, "share", "KL")]
    columns += ["zero-shot", "change", "able"] if zero_shot else []
    columns += ["IFEval prompts", "instructions"] if generates else []

    def cells(row: Row) -> list[str]:
        first = [label(row), str(row["removed"]), weights(row), f"{row['bytes'] / 1e6:.1f}"]
        return [
            *first,
            *speed_cells(row),
            *text_cells(row, texts),
            *task_cells(row, zero_shot, generates),
        ]

    lines = introduction(record, texts, generates)
    for removed in sorted({row["removed"] for row in rows}):
        title = f"{removed} layers removed" if removed else "No layer removed"
        block = sorted((row for row in rows if row["removed"] == removed), key=lambda row: row["bytes"])
        lines += ["", f"## {title}", "", *table(columns, map(cells, block))]
    equal = [row for row in rows if row["bits"] in ((2, 3, 4) if not row["removed"] else (4,))]
    if equal:
        lines += ["", "## At equal bytes", "", "Layers removed and 4 bits, against 4, 3 and 2 bits alone."]
        lines += ["", *table(columns, map(cells, sorted(equal, key=lambda row: row["bytes"])))]
    if zero_shot:
        ordered = sorted(rows, key=lambda row: (row["removed"], row["bytes"]))
        lines += ["", "## Each zero-shot task", "", "Accuracy in percent ± standard error.", ""]
        lines += table(
            ["method", "layers removed", "weights", *zero_shot], (each(r, zero_shot) for r in ordered)
        )
    for row in rows:
        lines += curve(row) if "checks" in row else []
    lines += [f"\n{name}: not possible, {reason}." for name, reason in record["failed"].items()]
    return "\n".join(lines) + "\n"


def curve(row: Row) -> list[str]:
    """What was measured while a row learned, with a mark at the weights that it has."""
    checks = [Check(**check) for check in row["checks"]]
    kept = best_check(checks)

    def cells(number: int, check: Check) -> list[str]:
        step = f"{check.step}" + ", kept" * (number == kept)
        return [step, *("-" if value is None else f"{value:.4f}" for value in check[1:])]

    title = f"{label(row)}, {row['removed']} layers removed: what was measured while it learned"
    what = "KL(source || row) in nats per token, on sequences that it does not learn."
    columns = ["step", "training loss", "the text that it learns", "other text"]
    return ["", f"## {title}", "", what, "", *table(columns, (cells(*pair) for pair in enumerate(checks)))]


def each(row: Row, zero_shot: Sequence[str]) -> list[str]:
    """The cells of a row in the table of single tasks."""
    found = (row["tasks"].get(task) for task in zero_shot)
    scores = [percent((task["accuracy"], task["standard_error"])) if task else "-" for task in found]
    return [label(row), str(row["removed"]), weights(row), *scores]


def table(columns: Sequence[str], rows: Any) -> list[str]:
    """The lines of a Markdown table."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return lines + [f"| {' | '.join(cells)} |" for cells in rows]


def where(rows: Sequence[Row]) -> str:
    """What measured the texts, the tasks and the speed."""
    kinds = {kind: {part["on"] for row in rows for part in row[kind].values()} for kind in ("texts", "tasks")}
    kinds["speed"] = {row["speed"]["on"] for row in rows if row["speed"]}
    return "; ".join(f"{kind} on {', '.join(sorted(on))}" for kind, on in kinds.items() if on)


def introduction(record: dict[str, Any], texts: Sequence[str], generates: bool) -> list[str]:
    """What made the tables, on what; and what their columns are."""
    model, machine, (samples, length) = record["model"], record["machine"], record["calibration"]
    libraries, options, rows = record["libraries"], record["options"], record["rows"]
    speeds = [row["speed"] for row in rows if row["speed"]]
    lines = [f"`{record['command']}`", "", *([record["note"], ""] if record["note"] else [])]
    lines += [
        f"{model['name']}: {model['type']}, {model['layers']} layers x {model['hidden_size']}, "
        f"{model['parameters']:,} parameters, of which {record['outer_bytes'] / 1e6:.1f} MB (embedding, head "
        f"and final norm) stay as they are in every row. {samples} x {length} calibration tokens; GPTQ with "
        f"groups of {options['group_size']}.",
        f"{where(rows)}; {machine['threads']} threads, torch {libraries['torch']}, transformers "
        f"{libraries['transformers']} here.",
        "",
        "- MB: weights on disk, 10^6 bytes.",
    ]
    if speeds:
        kinds = {weights(row): row["speed"]["linear"] for row in rows if row["speed"]}
        linears = ", ".join(f"{kind}: {linear}" for kind, linear in kinds.items())
        least, runs = min(speed["cpu_share"] for speed in speeds), len(speeds[0]["decode_runs"])
        lines.append(
            "- prefill, decode: tokens/s of plain transformers in a process of its own (linear layers of "
            f"{linears}), one sequence, {options['prompt_tokens']} tokens read and "
            f"{options['decoded_tokens']} written, median of {runs} runs. The processes had "
            f"{100 * least:.0f}% of their threads' time or more; where that is far below 100, others used "
            "the machine and speeds cannot be compared."
        )
    if not options["loader_python"] and any(row["bits"] for row in rows):
        lines.append("- Speed of quantized rows needs --loader-python, with GPTQModel; it is not measured.")
    for text in texts:
        seen = next((row["texts"][text] for row in rows if text in row["texts"]), None)
        if seen:
            lines.append(
                f"- {text}: perplexity per token ± standard error over documents: {seen['tokens']:,} tokens "
                f"in {seen['sequences']} sequences of at most {options['eval_length']}."
            )
    lines.append(
        "- share: (perplexity - source's) / (SLEB's - source's), SLEB with as many layers and the same bits. "
        "KL: KL(source || row) per token, in nats, on the same text."
    )
    if zero_shot := record["tasks"]["zero_shot"]:
        scored = [row["tasks"][task] for row in rows for task in zero_shot if task in row["tasks"]]
        count = max((len(task["items"]) for task in scored), default=0)
        dtype = record["tasks"]["dtype"].removeprefix("torch.")
        lines.append(
            f"- zero-shot: mean accuracy in percent of {len(zero_shot)} tasks, {count} items each at most, "
            f"the same for all rows, by lm-evaluation-harness in {dtype}; normalized by length (acc_norm) "
            "where usual. change: against the source, on the same items. able: the mean of the tasks that "
            "the source itself can do, two standard errors above the best constant answer "
            f"({', '.join(record['tasks']['able']) or 'none'}); on the others a score is bias and chance."
        )
    if generates:
        found = next(row["tasks"][IFEVAL] for row in rows if IFEVAL in row["tasks"])
        chat = "with" if found["chat_template"] else "without"
        lines.append(
            f"- IFEval: percent of {len(found['items'])} prompts of which all instructions are followed, "
            f"and of all single instructions (strict); greedy, at most {options['new_tokens']} tokens, "
            f"{chat} the chat template. A broken model follows some by chance, such as to use no comma."
        )
    if record["absent"]:
        lines.append(f"- Left out, for want of data: {', '.join(record['absent'])}.")
    return lines
