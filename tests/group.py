"""A group of two processes, each forked from one that has loaded everything, so that starting is quick.

`tests/test_ranks.py` starts a few with torchrun, as a user does.
"""

import multiprocessing
import os
import runpy
import socket
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tests.runs import Outcome

LOADED = ["transformers.models.llama.modeling_llama", "numba", "mkaq.report", "mkaq.session", "mkaq.pipeline"]
LOADED += ["tests.choices_worker", "tests.reliability.process"]
SIZE = 2


class Group:
    """Two processes that run one program with the same arguments.

    Attributes:
        processes: By rank.
    """

    def __init__(self, told: Path, program: str, *arguments: object) -> None:
        """Starts them.

        Args:
            told: A folder for what they print; made if absent.
            program: A module, run as `python -m` runs it.
            arguments: Of the program.
        """
        told.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(LOADED)
        line = [program, *map(str, arguments)]
        self.told = told
        self.processes: list[ForkServerProcess] = []
        for rank in range(SIZE):
            member = context.Process(target=_run, args=(rank, port, told, line))
            member.start()
            self.processes.append(member)

    def ended(self, rank: int, seconds: float = 300) -> Outcome:
        """Waits for one of them; raises TimeoutError, and ends all, if it takes longer."""
        self.processes[rank].join(seconds)
        code = self.processes[rank].exitcode
        if code is None:
            for process in self.processes:
                process.kill()
            raise TimeoutError(f"process {rank} runs after {seconds} s: {self._said(rank, 'err')}")
        return Outcome(code, self._said(rank, "out"), self._said(rank, "err"))

    def _said(self, rank: int, kind: str) -> str:
        return (self.told / f"{kind}{rank}").read_text()


def in_two(told: Path, program: str, *arguments: object) -> Outcome:
    """Runs a program in two processes: a code that is not 0 if there is one, and what both told, in turn."""
    group = Group(told, program, *arguments)
    first, second = (group.ended(rank) for rank in range(SIZE))
    return Outcome(first.code or second.code, first.out + second.out, first.err + second.err)


def _run(rank: int, port: int, told: Path, line: list[str]) -> None:
    """What torchrun gives to a process, and one thread."""
    import torch

    for descriptor, kind in ((1, "out"), (2, "err")):
        with (told / f"{kind}{rank}").open("w") as file:
            os.dup2(file.fileno(), descriptor)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    os.environ |= {"WORLD_SIZE": str(SIZE), "LOCAL_WORLD_SIZE": str(SIZE)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    sys.argv = line
    runpy.run_module(line[0], run_name="__main__", alter_sys=True)
