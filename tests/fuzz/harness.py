"""One target under atheris, in a process of its own: `tests.fuzz` starts it.

A crash does not end it: the smallest input of each kind is kept, and the fuzzing goes on.
"""

import resource
import shlex
import sys
import traceback
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import atheris
import torch

with atheris.instrument_imports(include=["mkaq", "yaml.constructor", "yaml.resolver", "gguf.gguf_reader"]):
    from mkaq.errors import MkaqError
    from tests.fuzz.mutate import MUTATIONS
    from tests.fuzz.readers import READERS

_MEMORY = 4 << 30  # bytes of address space beyond what is there before the first input


def signature(error: BaseException) -> str:
    """The kind of an error and the line of mkaq, or of a reader, that let it out."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if "mkaq" in f.filename or "fuzz" in f.filename
    ]
    ours = [frame for frame in frames if "site-packages" not in frame.filename]
    return f"{type(error).__name__}-{Path(ours[-1].filename).stem}-{ours[-1].lineno}"


def main() -> None:
    """Arguments: the target, the folder for crashes, and those of libFuzzer."""
    name, crashes = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    with TemporaryDirectory() as work:
        read = READERS[name](Path(work))

        def test_one_input(data: bytes) -> None:
            try:
                read(data)
            except MkaqError:
                pass
            except Exception as error:
                keep(data, error)

        def keep(data: bytes, error: Exception) -> None:
            path = crashes / signature(error)
            if not path.exists() or len(data) < path.stat().st_size:
                if not path.exists():
                    print(f"CRASH {path.name}: {error!s:.200}", file=sys.stderr, flush=True)
                path.write_bytes(data)

        def mutate(data: bytes, max_size: int, seed: int) -> bytes:
            random = Random(seed)
            if name in MUTATIONS and random.random() < 0.7:
                try:
                    changed = MUTATIONS[name](data, random)
                except (ArithmeticError, RecursionError, TypeError, ValueError):  # not of that form
                    changed = b""
                if 0 < len(changed) <= max_size:
                    return changed
            return atheris.Mutate(data, max_size)

        _limit_memory()
        again = shlex.join([sys.executable, "-m", "tests.fuzz.harness", name, str(crashes)])  # for -merge=1
        atheris.Setup([again, *sys.argv[3:]], test_one_input, custom_mutator=mutate)
        atheris.Fuzz()


def _limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))


if __name__ == "__main__":
    main()
