"""README's table of the runtimes that run an artifact, made from what `mkaq plan` answers.

usage: python -m benchmarks.runtimes_table [README]

Replaces the table between the two marks in the file.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mkaq.checkpoint.reader import Checkpoint
from mkaq.checkpoint.resolve import resolve_model
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.export.formats import EXPORTS
from mkaq.formats.runtimes import RUNTIMES, runtimes
from mkaq.stages.quantize import BitsandbytesSection, GptqSection

START, END = "<!-- runtimes -->\n", "<!-- /runtimes -->\n"
_GPTQ = [
    *({"bits": bits, "sym": sym} for bits in (4, 8, 3, 2) for sym in (True, False)),
    {"bits": 4, "group_size": -1},
    {"bits": 4, "group_size": 16},
    *({"bits": bits, "desc_act": True} for bits in (4, 8)),
    {"bits": 4, "desc_act": True, "static_groups": True},
    {"bits": 4, "lm_head": True},
]


def table() -> str:
    """Markdown: a row for each kind of artifact, a column for each runtime."""
    model = open_checkpoint(resolve_model("builtin:tiny-llama"))
    lines = [f"| | {' | '.join(RUNTIMES)} |", "|" + "---|" * (len(RUNTIMES) + 1)]
    return "\n".join(lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in _rows(model)]) + "\n"


def _rows(model: Checkpoint) -> Iterator[tuple[str, list[str]]]:
    yield "merged only", _answers(model, None)
    for options in _GPTQ:
        section = GptqSection(method="gptq", **{"group_size": 128, **options})
        shown = [
            f"`{key}`" if value is True else f"`{key}: {str(value).lower()}`"
            for key, value in options.items()
            if (key, value) != ("sym", True) and key != "bits"
        ]
        words = [f"GPTQ {options['bits']} bits", *shown]
        yield ", ".join(words), _answers(model, section.config(torch.bfloat16))
    for bits in (8, 4):
        section = BitsandbytesSection(method="bitsandbytes", bits=bits)
        yield f"bitsandbytes {bits} bits", _answers(model, section.config(torch.bfloat16))


def _answers(model: Checkpoint, config: dict[str, Any] | None) -> list[str]:
    """For each runtime yes, no, or the format that it must be given."""
    formats = [name for name, export in EXPORTS.items() if not export.refusal(model, config)]
    alone = {row.runtime for row in runtimes(config) if row.runs}
    through = {
        row.runtime: f"`{name}`" for name in formats for row in runtimes(config, formats=[name]) if row.runs
    }
    return ["yes" if name in alone else through.get(name, "no") for name in RUNTIMES]


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "README.md")
    before, rest = path.read_text().split(START)
    path.write_text(f"{before}{START}{table()}{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
