"""A GGUF file that writes, in llama.cpp, by the package xllamacpp; torch, slow to load, is not needed."""

import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import psutil

from mkaq.errors import CheckpointError, UsageError
from mkaq.generate.pace import Pace
from mkaq.generate.sampling import Sampling
from mkaq.generate.writer import Message, Reply, Show, no_tokens, too_long

_TEMPLATE = "tokenizer.chat_template"
_PATIENCE = 5.0  # seconds for llama.cpp to stop


def serve(path: Path, threads: int, *, room: int = 0, on_cpu: bool = False) -> Any:
    """A GGUF file in llama.cpp's server, which answers this process alone.

    Args:
        path: The file.
        threads: Threads that compute.
        room: Tokens that the KV cache has room for; 0 for the model's whole context.
        on_cpu: Whether all layers stay off a GPU.

    Raises:
        UsageError: If the package is not installed.
        CheckpointError: If llama.cpp does not load the file.
    """
    try:
        import xllamacpp
    except ImportError:
        raise _missing(path) from None
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.verbosity, parameters.warmup, parameters.n_parallel = -1, False, 1
    parameters.api_keys = [secrets.token_hex(16)]  # it listens on this machine, to nobody
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.n_ctx = room
    if on_cpu:
        parameters.n_gpu_layers = 0
    try:
        return xllamacpp.Server(parameters)
    except RuntimeError as error:
        raise CheckpointError(f"llama.cpp does not load it: {error}", where=path) from None


def fields_of(path: Path) -> Mapping[str, Any]:
    """The metadata of a GGUF file.

    Raises:
        UsageError: If the package that reads it is not installed.
        CheckpointError: If the file is damaged.
    """
    try:
        from mkaq.formats.gguf_types import read
    except ImportError:
        raise _missing(path) from None
    try:
        return read(path).fields
    except Exception as error:  # the reader trusts the file and fails in any way
        fix = "download or export it again"
        raise CheckpointError(f"is no whole GGUF file: {str(error)[:200]}", where=path, fix=fix) from None


def _threads() -> int:
    """OMP_NUM_THREADS, as torch has it, or as many as there are cores for this process."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return int(asked) if asked.isdecimal() and int(asked) else min(psutil.cpu_count(False) or 1, allowed)


def _missing(path: Path) -> UsageError:
    fix = "pip install 'mkaq[llamacpp]'"
    return UsageError("a GGUF file is read by the packages gguf and xllamacpp", where=path, fix=fix)


class LlamaCppWriter:
    """Implements `Writer`.

    Args:
        path: The file.
        device: `cpu` keeps all layers off a GPU.
        sampling: How the next token is chosen.

    Attributes:
        talks: Whether it has a chat template.

    Raises:
        UsageError: If there is no such file, or the package is not installed.
        CheckpointError: If llama.cpp does not load it.
    """

    def __init__(self, path: Path, device: str, sampling: Sampling) -> None:
        if not path.is_file():
            raise UsageError("is no file" if path.exists() else "no such file", where=path)
        if device not in ("auto", "cpu"):
            from mkaq.walk.device import pick_device

            pick_device(device)  # refuses what is not there
        self.talks = _TEMPLATE in fields_of(path)
        self._server = serve(path, _threads(), on_cpu=device == "cpu")
        self._path, self._sampling = path, sampling

    def complete(self, prompt: str, max_new_tokens: int, show: Show) -> Reply:
        """Continues a text; see `Writer`."""
        if not prompt:
            raise no_tokens()
        request = {"prompt": prompt, "max_tokens": max_new_tokens}
        return self._say(self._server.handle_completions, request, lambda choice: choice["text"], show)

    def answer(self, messages: Sequence[Message], max_new_tokens: int, show: Show) -> Reply:
        """Answers in a conversation; see `Writer`."""
        request = {"messages": list(messages), "max_tokens": max_new_tokens}
        handle = self._server.handle_chat_completions
        return self._say(handle, request, lambda choice: choice["delta"].get("content"), show)

    def _say(
        self,
        handle: Callable[[str, Callable[[str], bool]], object],
        request: dict[str, Any],
        piece_of: Callable[[Any], str | None],
        show: Show,
    ) -> Reply:
        """Hands the pieces over from another thread: what interrupts this one would be lost in llama.cpp."""
        text, pace, full = list[str](), Pace(), False
        chunks: SimpleQueue[str | Exception | None] = SimpleQueue()
        stopped = Event()

        def take(chunk: str) -> bool:
            """Whether to stop."""
            chunks.put(chunk)
            return stopped.is_set()

        def work() -> None:
            try:
                handle(json.dumps(request | self._options()), take)
                chunks.put(None)
            except Exception as error:
                chunks.put(error)

        thread = Thread(target=work, daemon=True)
        thread.start()
        try:
            while (chunk := chunks.get()) is not None:
                if isinstance(chunk, Exception):
                    raise chunk
                message = json.loads(chunk)
                if "error" in message:
                    raise self._error(str(message["error"].get("message")))
                choice = message["choices"][0]
                if piece := piece_of(choice):
                    text.append(piece)
                    show(piece)
                if timings := message.get("timings"):
                    pace.prompt_tokens = timings["prompt_n"]  # those not in the cache
                    pace.prompt_seconds = timings["prompt_ms"] / 1000
                    pace.tokens, pace.seconds = timings["predicted_n"], timings["predicted_ms"] / 1000
                    full = choice["finish_reason"] == "length" and pace.tokens < request["max_tokens"]
        finally:
            stopped.set()
            thread.join(_PATIENCE)
        return Reply("".join(text), pace, full)

    def _error(self, said: str) -> UsageError:
        """What llama.cpp says of a request, in words of ours where a text is too long."""
        if long := re.search(r"request \((\d+) tokens\) exceeds the available context size \((\d+)", said):
            return too_long(int(long[1]), int(long[2]), self._path)
        return UsageError(said[:300], where=self._path)

    def _options(self) -> dict[str, Any]:
        """The sampling, with the filters in the order of transformers."""
        options = self._sampling._asdict()
        samplers = ["temperature", "top_k", "top_p", "min_p"]
        return options | {"samplers": samplers, "repeat_penalty": 1.0, "stream": True, "cache_prompt": True}
