"""How long `mkaq plan` said that stages would take, and how long they took.

usage: python -m benchmarks.plan_times "built-in=runs/tiny-llama-int4" [TITLE=RUN ...]

`mkaq run` times a small piece of each kind of work before it begins, and writes what it expects of every
stage into run.json beside what the stage took. This reads the run.json of finished runs, each made by one
command that ended without an interruption, and writes benchmarks/results/plan_times.json and .md.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.quality_report import RESULTS
from benchmarks.real_report import table as markdown
from mkaq.files import write_json
from mkaq.units import duration

SHORT = 2.0  # seconds: below, starting costs more than the work


def main() -> None:
    """Reads run.json files and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="TITLE=RUN")
    rows: list[dict[str, Any]] = []
    for title, _, folder in (run.rpartition("=") for run in parser.parse_args().runs):
        log = json.loads((Path(folder) / "run.json").read_text(encoding="utf-8"))
        rows += compared(title, log)
    write_json(RESULTS / "plan_times.json", {"machine": machine(torch.get_num_threads()), "rows": rows})
    (RESULTS / "plan_times.md").write_text(table(rows), encoding="utf-8")
    print(table(rows))


def compared(title: str, log: dict[str, Any]) -> list[dict[str, Any]]:
    """Each stage of a run: seconds expected and taken.

    Raises:
        SystemExit: If a stage was not made in this run.
    """
    taken: dict[str, float] = {}
    for row in log["stages"]:
        if row["reused"]:
            raise SystemExit(f"{title}: {row['stage']} was kept from another run; run it with --fresh")
        stage = row["stage"].partition("/")[0]
        taken[stage] = taken.get(stage, 0.0) + row["seconds"]
    expected: dict[str, float] = log["expected_seconds_by_stage"]
    return [
        {"run": title, "stage": stage, "expected": expected[stage], "taken": seconds}
        for stage, seconds in taken.items()
        if stage in expected
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown."""
    cells = []
    for row in rows:
        short = max(row["expected"], row["taken"]) < SHORT
        ratio = "-" if short else f"{row['taken'] / max(row['expected'], 1e-9):.2f}"
        cells.append([row["run"], row["stage"], duration(row["expected"]), duration(row["taken"]), ratio])
    columns = ["run", "stage", "expected", "taken", "taken / expected"]
    return "\n".join(markdown(columns, cells)) + "\n"


if __name__ == "__main__":
    main()
