"""What commands print on stdout: tables for people, JSON for programs."""

import io
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any


def print_whatever_it_is() -> None:
    """Makes stdout and stderr escape characters that their encoding cannot represent."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_json(data: Any) -> None:
    """Prints JSON in mkaq's form, in ASCII if stdout's encoding cannot represent the text."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(data, indent=2)
    print(text)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints columns of the necessary width, the first one left-aligned and the others right-aligned."""
    table = [header, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    for row in table:
        cells = [
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
