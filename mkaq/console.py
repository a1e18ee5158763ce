"""What commands print: lines and tables for people, JSON for programs."""

import io
import json
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any


def escape_unencodable() -> None:
    """Makes stdout and stderr escape characters that their encoding cannot represent."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


_CONTROLS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters but tab and line feed, and those that turn the direction of writing."""


def printable(text: str) -> str:
    """The text with control characters as escapes: names of somebody's files steer no terminal."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def say(line: object, *, error: bool = False) -> None:
    """Prints one line that may hold names of somebody else."""
    print(printable(str(line)), file=sys.stderr if error else sys.stdout, flush=error)


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
    table = [[printable(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    for row in table:
        cells = [
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
