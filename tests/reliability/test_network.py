"""Nothing asks the network: every command runs where each look-up of a name and each connection fails."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.runs import command

ASKS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind", "socket.sendto")
FORBID = f"""
def forbid(event, arguments):
    if event in {ASKS!r}: raise RuntimeError('the network was asked: ' + event)
sys.addaudithook(forbid)"""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, which no setting keeps from the network but the prohibition."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    line = command(*arguments)
    line[2] = line[2].replace("pass;", f"exec({FORBID!r});", 1)
    return subprocess.run(line, capture_output=True, text=True, env=environment)


def test_the_prohibition_is_one(tmp_path: Path) -> None:
    line = f"import sys; exec({FORBID!r}); import socket; socket.getaddrinfo('localhost', 80)"
    done = subprocess.run([*command()[:2], line], capture_output=True, text=True)
    assert "the network was asked: socket.getaddrinfo" in done.stderr


@pytest.mark.parametrize("name", ["run", "verify", "eval", "generate"])
def test_no_command_asks_the_network(name: str, runs: list[Path], tmp_path: Path) -> None:
    recipe, _, whole = runs
    model = whole / "artifact"
    arguments = {
        "run": ("run", recipe, "--output", tmp_path / "run"),
        "verify": ("verify", model),
        "eval": ("eval", whole / "merge", "--num-samples", "1", "--max-seq-length", "32"),
        "generate": ("generate", model, "a"),
    }[name]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr


def test_a_hub_model_is_what_asks_the_network(runs: list[Path], tmp_path: Path) -> None:
    done = run("run", runs[0], "--set", "model.path=nobody/nothing", "--output", tmp_path / "run")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
