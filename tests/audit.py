"""Asks pip-audit for known vulnerabilities of pinned versions; where its database is out of reach, says so.

usage: python -m tests.audit PIP_AUDIT FILE...

pip-audit ends well too where it could look nothing up, so what it looked up is counted. Exit code 1: a
version has a known vulnerability. 0: none has, or none could be looked up.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SECONDS = 300


def pins(files: Sequence[Path]) -> list[str]:
    """Every NAME==VERSION that the files name, with its marker if it has one."""
    lines = (line for file in files for line in file.read_text().splitlines())
    return sorted({line.split("\\")[0].strip() for line in lines if line[:1].isalnum()})


def looked_up(program: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """What the database says of each version; empty if there is no answer."""
    with tempfile.TemporaryDirectory() as folder:
        found: list[dict[str, Any]] = []
        for number, batch in enumerate(once_each(names)):
            path = Path(folder, f"{number}.txt")
            path.write_text("\n".join(batch))
            line = [program, "--disable-pip", "--no-deps", "--format", "json", "--requirement", str(path)]
            try:
                done = subprocess.run(line, capture_output=True, text=True, timeout=SECONDS)
                found += json.loads(done.stdout)["dependencies"]
            except (OSError, ValueError, subprocess.TimeoutExpired):
                return []
    return [entry for entry in found if "skip_reason" not in entry]


def once_each(names: Sequence[str]) -> Iterator[list[str]]:
    """Lists that name no package twice, as pip-audit demands."""
    left = list(names)
    while left:
        first = {name.split("==")[0].lower(): name for name in left[::-1]}
        yield sorted(first.values())
        left = [name for name in left if name not in first.values()]


def report(asked: int, found: Sequence[dict[str, Any]]) -> tuple[int, list[str]]:
    """The exit code, and what to print."""
    if not found:
        return 0, ["audit skipped: the database of vulnerabilities cannot be reached from here"]
    lines = [
        f"{entry['name']} {entry['version']}: {bug['id']}, fixed in {bug['fix_versions'] or 'none'}"
        for entry in found
        for bug in entry["vulns"]
    ]
    summary = f"{len(found)} of {asked} versions looked up, {len(lines)} known vulnerabilities"
    return int(bool(lines)), [*lines, summary]


if __name__ == "__main__":
    program, *paths = sys.argv[1:]
    wanted = sorted({pin.split(";")[0].strip() for pin in pins([Path(path) for path in paths])})
    code, said = report(len(wanted), looked_up(program, wanted))
    print("\n".join(said))
    sys.exit(code)
