"""Runs of mkaq for the tests: how one is started, what it told, what lies in its folder."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mkaq import pipeline
from mkaq.digests import digest_of
from mkaq.manifest import MANIFEST
from mkaq.progress import Progress
from mkaq.recipe_file import load_recipe


@dataclass
class Outcome:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str


Mkaq = Callable[..., Outcome]
ROOT = Path(__file__).parent.parent
STAGES = ["evaluate/source", "calibrate", "analyze", "merge", "evaluate/merge"]
STAGES += ["quantize", "evaluate/quantize", "artifact"]
MAIN = "from mkaq.cli import main; main()"
ONE_THREAD = "import torch; torch.set_num_threads(1)"
LOGS = ("recipe.yaml", "run.json", ".lock")  # of the last run, whatever became of it


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for a test: what is tiny takes longer with two on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run_quietly(recipe: Path, folder: Path) -> Path:
    """A run without the command line, for fixtures; returns its folder."""
    with one_thread():  # a fixture of the session is made before the test's module sets it
        pipeline.run(load_recipe(recipe), folder, torch.device("cpu"), Progress(quiet=True))
    return folder


def command(*arguments: object, first: str = "pass") -> list[str]:
    """A command line for another process, which computes as this one does and runs `first` first."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {ONE_THREAD}; {first}; {MAIN}"
    return [sys.executable, "-c", code, *map(str, arguments)]


def one_message(outcome: Outcome, code: int, *words: str) -> None:
    """One message on stderr, with the words that it must hold, nothing on stdout, and the exit code."""
    assert outcome.code == code, outcome.err
    assert outcome.out == "" and outcome.err.count("mkaq: ") == 1
    assert "Traceback" not in outcome.err and "fault of mkaq" not in outcome.err
    for word in words:
        assert word in outcome.err, (word, outcome.err)


def told(outcome: Outcome) -> dict[str, bool]:
    """From the lines of a run: each stage, and whether it was kept."""
    lines = [line.partition(": ") for line in outcome.err.splitlines()]
    return {stage: text == "unchanged, kept" for stage, _, text in lines if stage in STAGES}


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; of a link to a folder, where it leads."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink() and path.is_dir():
            found[str(path.relative_to(folder))] = bytes(path.readlink())
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def kept(folder: Path) -> dict[str, bytes]:
    """Every file of a run's folder, those of the store too, but its logs and its links to stages."""
    links = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink()}
    return {name: data for name, data in tree(folder).items() if name not in {*LOGS, *links}}


def forge(artifact: Path, edit: Callable[[Any], Any]) -> None:
    """Changes a manifest and gives it a digest that fits."""
    data = json.loads((artifact / MANIFEST).read_text())
    edit(data)
    del data["digest"]
    data["digest"] = digest_of(data)
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    (artifact / MANIFEST).write_bytes(text.encode(errors="surrogatepass"))


def python_of(environment: str) -> Path:
    """The Python of an environment of its own, `.venv-NAME` unless MKAQ_NAME_PYTHON is set."""
    default = Path(__file__).parent.parent / f".venv-{environment}" / "bin" / "python"
    return Path(os.environ.get(f"MKAQ_{environment.upper()}_PYTHON", default))
