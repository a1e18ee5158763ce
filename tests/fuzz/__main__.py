"""Fuzzes what mkaq reads: `python -m tests.fuzz TARGET... --seconds N [--keep]`; `make fuzz` does all.

It needs `pip install atheris`. A crash is any error that is not one of mkaq's own, a read of more than 30
seconds, or one that needs gigabytes: its input is left in crashes/TARGET, to become a test. `--keep` puts
the smallest inputs that cover what was covered into corpus/TARGET.zip.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.fuzz.corpus import CRASHES, kept, pack
from tests.fuzz.readers import READERS
from tests.fuzz.samples import SEEDS

_LIMITS = ["-max_len=16384", "-len_control=0", "-timeout=30", "-rss_limit_mb=4096", "-print_final_stats=1"]


def main() -> int:
    """Prints one row a target; returns 1 if anything crashed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", choices=[*READERS, []], metavar="TARGET", help="default: all")
    parser.add_argument("--seconds", type=int, default=600, help="of each target (default 600)")
    parser.add_argument("--keep", action="store_true", help="keep the corpus")
    chosen = parser.parse_args()
    print("| target | executions | covered edges | crashes |\n|---|---|---|---|")
    return max([fuzz(target, chosen.seconds, keep=chosen.keep) for target in chosen.targets or READERS])


def fuzz(target: str, seconds: int, *, keep: bool) -> int:
    """Fuzzes one target and prints its row."""
    crashes = CRASHES / target
    crashes.mkdir(parents=True, exist_ok=True)
    before = set(crashes.iterdir())
    with TemporaryDirectory() as work:
        folder, seeds = Path(work, "corpus"), Path(work, "seeds")
        folder.mkdir()
        seeds.mkdir()
        for number, data in enumerate([*SEEDS[target](seeds), *kept(target)]):
            (folder / f"seed-{number}").write_bytes(data)
        log = _harness(target, crashes, f"-max_total_time={seconds}", *_LIMITS, folder)
        if keep:
            smallest = Path(work, "smallest")
            smallest.mkdir()
            _harness(target, crashes, "-merge=1", *_LIMITS, smallest, folder)
            pack(target, [path.read_bytes() for path in smallest.iterdir()])
    done = re.findall(r"^#(\d+)\t.*cov: (\d+)", log, re.MULTILINE)
    executions, covered = map(int, done[-1])
    found = sorted(set(crashes.iterdir()) - before)
    print(f"| {target} | {executions:,} | {covered:,} | {len(found)} |", flush=True)
    for path in found:
        print(f"  {path}", file=sys.stderr)
    return int(bool(found))


def _harness(target: str, crashes: Path, *arguments: object) -> str:
    """Runs the harness, and returns what it said; it ends early only with an input that hangs it."""
    before = set(crashes.iterdir())
    line = [sys.executable, "-m", "tests.fuzz.harness", target, crashes, f"-artifact_prefix={crashes}/"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(part) for part in (*line, *arguments)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    if done.returncode and set(crashes.iterdir()) == before:
        raise SystemExit(f"{target} did not run to its end:\n{done.stderr[-2000:]}")
    return done.stderr


if __name__ == "__main__":
    sys.exit(main())
