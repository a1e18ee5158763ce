"""Everything on one GPU by one command: does it run, does it agree with a CPU, how long does each stage take.

usage: python -m benchmarks.gpu_check [--minutes 8] [--shape llama3-8b] [--layers 6] [--out FOLDER]
       python -m benchmarks.gpu_check --device cpu --small      (tiny, to see that this script works)
       python -m benchmarks.gpu_check --wheels                  (what is missing here, and how to get it)

Needs this repository, torch, transformers and a few small packages; no network. Random checkpoints are
made on the spot. Small ones go through every kind of merging, recovery and quantization on the device and
on the CPU, and the results are compared and verified on both; one of a real model's layer shapes is timed
stage by stage, and one layer's work is profiled for the share that is matrix products.

Each part has a time limit of its own and is recorded, failed or not, in FOLDER/gpu.json as soon as it is
over; FOLDER/gpu.md is the same as tables. An error that leaves the device unusable restarts the script
with the next part. The exit code is 1 if a part failed or was left out for lack of time.
"""

import argparse
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from benchmarks.gpu_report import tables
from mkaq.errors import UsageError

START = time.monotonic()
SPARE = 10  # seconds of the time that no part may have
RESULTS = Path(__file__).parent / "results"
KERNELS = "large/kernels"  # needs no checkpoint
LIMIT_MB = 64 * 1.048576
NEEDED = {  # what it imports, the packages that have it, MB of their wheels
    "accelerate": ("accelerate", 0.4),
    "jinja2": ("jinja2 markupsafe", 0.2),
    "psutil": ("psutil", 0.2),
    "pydantic": ("pydantic", 2.8),  # with pydantic-core and two small ones
    "scipy": ("scipy", 35.4),
    "threadpoolctl": ("threadpoolctl", 0.1),
    "xxhash": ("xxhash", 0.5),
}
USEFUL = {  # and what is done without them
    "bitsandbytes": ("bitsandbytes", 43.2, "the bitsandbytes parts are left out"),
    "numba": ("numba llvmlite", 63.6, "GPTQ on the CPU uses the plain loops"),
}
PLATFORMS = [f"manylinux{version}_x86_64" for version in ("_2_28", "_2_27", "_2_24", "2014")]


def main() -> None:
    options = parse()
    missing = [name for name in NEEDED if find_spec(name) is None]
    if options.wheels or missing:
        print(wheels(missing))
        sys.exit(0 if options.wheels else 2)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if shutil.which("cc") is None:
        os.environ.setdefault("TORCH_DISABLE_NATIVE_JIT", "1")  # else torch compiles kernels with it
    if find_spec("numba") is None:
        stand_in_for_numba()
    for library in ("bitsandbytes", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        record = check(options)
    except UsageError as error:  # no such device
        sys.exit(str(error))
    print(tables(record))
    sys.exit(1 if any(part["status"] in ("failed", "no time") for part in record["parts"].values()) else 0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--minutes", type=float, default=8.0, help="parts that do not fit are left out")
    parser.add_argument("--shape", default="llama3-8b", help="of benchmarks/shapes.py")
    parser.add_argument("--layers", type=int, default=6, help="of the checkpoint of that shape (5 or more)")
    parser.add_argument("--small", action="store_true", help="a tiny model in the place of that shape")
    parser.add_argument("--part", action="append", metavar="NAME", help="this one, and what it needs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gpu.json and gpu.md")
    parser.add_argument("--wheels", action="store_true", help="say what is missing here, and stop")
    parser.add_argument("--resume", type=Path, metavar="WORK", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.layers < 5:
        parser.error("--layers: the recipes merge layers of 5 or more")
    return options


def check(options: argparse.Namespace) -> dict[str, Any]:
    """Runs all parts; returns what gpu.json holds."""
    from benchmarks.gpu_parts import Check

    work = options.resume or Path(tempfile.mkdtemp(prefix="gpu-check-"))
    options.out.mkdir(parents=True, exist_ok=True)
    file: Path = options.out / "gpu.json"
    try:
        checks = Check(options, work)
        record: dict[str, Any] = {"command": command_line(), **checks.told(), "seconds": 0.0, "parts": {}}
        if options.resume:
            record = json.loads(file.read_text())
        began, missing = START - record["seconds"], absent()
        for name, limit, part in checks.parts():
            if not wanted(name, options.part) or name in record["parts"]:
                continue
            left = 60 * options.minutes - SPARE - (time.monotonic() - began)
            row = record["parts"][name] = {"status": "failed", "error": "the process ended"}
            file.write_text(json.dumps(record, indent=2) + "\n")
            why = next((f"no {package} here" for package in missing if package in name), None)
            row |= {"status": "left out", "error": why} if why else guarded(part, min(limit, left), checks)
            record["seconds"] = time.monotonic() - began
            file.write_text(json.dumps(record, indent=2) + "\n")
            (options.out / "gpu.md").write_text(tables(record))
            told = f": {row['error'].splitlines()[-1][:200]}" if row["error"] else ""
            print(
                f"{name}: {row['status']}, {row.get('seconds', 0):.1f} s{told}", file=sys.stderr, flush=True
            )
            if row["status"] == "failed" and not checks.usable():
                restart(work)  # does not come back
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return record


def wanted(name: str, asked: list[str] | None) -> bool:
    """Whether a part is asked for, or makes the checkpoint of one that is."""
    if not asked or name in asked:
        return True
    folders = {part.partition("/")[0] for part in asked if part != KERNELS}
    return name.endswith("/build") and name.partition("/")[0] in folders


def guarded(part: Callable[[], dict[str, Any]], limit: float, checks: Any) -> dict[str, Any]:
    """Runs one part: its status, seconds, peaks, and what it found or why it failed."""
    if limit < 1:
        return {"status": "no time", "error": "the time was up", "seconds": 0.0}
    began, row = time.monotonic(), {"status": "ok", "error": None}
    checks.reset_peaks()
    try:
        with deadline(limit):
            row["found"] = part()
    except Exception as error:
        traceback.print_exc()
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        row |= {"status": "failed", "error": f"{type(error).__name__} at {where}: {str(error)[:1000]}"}
    return {**row, "seconds": time.monotonic() - began, "limit": limit, **checks.peaks()}


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Ends a `with` block by a TimeoutError, between two operations."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def restart(work: Path) -> None:
    """Goes on in a fresh process: after a failed kernel nothing runs on the device any more in this one."""
    arguments = [a for a in sys.argv[1:] if a != "--resume" and a != str(work)]
    sys.stdout.flush()
    command = [sys.executable, "-m", "benchmarks.gpu_check", *arguments, "--resume", str(work)]
    os.execv(sys.executable, command)


def absent() -> dict[str, str]:
    """The useful packages that are not here, and what is done without them."""
    found = {name: told for name, (_, _, told) in USEFUL.items() if find_spec(name) is None}
    return found | ({"numba": USEFUL["numba"][2]} if is_stand_in("numba") else {})


def is_stand_in(name: str) -> bool:
    return getattr(sys.modules.get(name), "stand_in", False)


def stand_in_for_numba() -> None:
    """Lets mkaq's compiled loops be defined without numba; `gpu_parts` then uses the plain ones."""
    module: Any = ModuleType("numba")
    module.__spec__ = ModuleSpec("numba", None)
    module.stand_in, module.prange = True, range
    module.njit = lambda **_: lambda function: function
    sys.modules["numba"] = module


def wheels(missing: list[str]) -> str:
    """What is missing here, and the commands that fetch it on a machine with a network."""
    useful = {name: row for name, row in USEFUL.items() if find_spec(name) is None}
    lines = [f"missing here: {', '.join([*missing, *useful]) or 'nothing'}"]
    names = [NEEDED[name][0] for name in missing]
    total = sum(NEEDED[name][1] for name in missing)
    for name, (packages, size, without) in useful.items():
        fits = total + size <= LIMIT_MB
        names, total = ([*names, packages], total + size) if fits else (names, total)
        too_large = "" if fits else "; too large to bring along with the rest"
        lines.append(f"{name} ({size} MB) is not needed: without it {without}{too_large}")
    if names:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        fixed = f"--only-binary=:all: --python-version {version} --implementation cp -d wheels "
        fixed += " ".join(f"--platform {platform}" for platform in PLATFORMS)
        lines.append(f"about {total:.0f} MB, fetched elsewhere by")
        if "pydantic" in names:  # it wants its core in one version
            lines.append(f"  pip download {fixed} pydantic")
        if others := [name for name in names if name != "pydantic"]:
            lines.append(f"  pip download --no-deps {fixed} {' '.join(others)}")
        lines.append("and installed here by")
        lines.append("  pip install --no-index --no-deps wheels/*.whl")
    return "\n".join(lines)


def command_line() -> str:
    return " ".join(["python -m benchmarks.gpu_check", *sys.argv[1:]])


if __name__ == "__main__":
    main()
