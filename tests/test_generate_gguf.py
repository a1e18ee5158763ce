"""generate and chat with a GGUF file, in llama.cpp; its package comes from the environment of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mkaq.checkpoint.resolve import BUILTIN
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.export import gguf
from mkaq.export.settings import GgufTypes, Settings
from tests.runs import Mkaq, one_message, python_of

PYTHON = python_of("llamacpp")
PACKAGES = (
    PYTHON.parent.parent / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
)
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
needs_llamacpp = pytest.mark.skipif(
    not (PACKAGES / "xllamacpp").is_dir(),
    reason=f"no llama.cpp at {PYTHON} (make .venv-llamacpp/ready makes it)",
)
Ask = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The built-in model as GGUF, with a chat template and without."""
    folder = tmp_path_factory.mktemp("gguf")
    source = BUILTIN["builtin:tiny-llama"]
    made = []
    for name, template in (("mute", None), ("talker", TEMPLATE)):
        model = folder / f"{name}-model"
        model.mkdir()
        for file in source.iterdir():
            if file.name != "chat_template.jinja":
                (model / file.name).write_bytes(file.read_bytes())
        if template:
            (model / "chat_template.jinja").write_text(template)
        (folder / name).mkdir()
        gguf.write(open_checkpoint(model), folder / name, Settings("model", gguf=GgufTypes()))
        made.append(folder / name / "model.gguf")
    return made[0], made[1]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Runs mkaq in a process that finds llama.cpp's package."""
    monkeypatch.setenv("PYTHONPATH", str(PACKAGES))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(*arguments: object, input: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mkaq", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, input=input)

    return run


@needs_llamacpp
def test_same_greedy_text_as_torch(files: tuple[Path, Path], ask: Ask, mkaq: Mkaq) -> None:
    command = "To be", "--max-new-tokens", 12
    done = ask("generate", files[0], *command)
    assert done.returncode == 0, done.stderr
    assert done.stdout == mkaq("generate", "builtin:tiny-llama", *command).out
    assert "12 written" in done.stderr and "tokens/s" in done.stderr and "of memory" in done.stderr
    told = json.loads(ask("generate", files[0], *command, "--json").stdout)
    assert done.stdout == f"To be{told['text']}\n" and told["tokens"] == 12


@needs_llamacpp
def test_torch_is_not_loaded(
    files: tuple[Path, Path], ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes longer to load than a small model to write."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not needed')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{PACKAGES}")
    done = ask("generate", files[0], "To be", "--max-new-tokens", 2)
    assert done.returncode == 0, done.stderr
    assert "torch is not needed" in ask("generate", files[0], "To be", "--device", "cuda").stderr


@needs_llamacpp
def test_sampling_is_obeyed(files: tuple[Path, Path], ask: Ask) -> None:
    def text(*options: object) -> str:
        return ask("generate", files[0], "To be", "--max-new-tokens", 12, *options).stdout

    greedy, hot = text(), ("--temperature", 3.0, "--seed", 1)
    assert text("--temperature", 3.0, "--top-k", 1) == greedy
    assert text("--temperature", 3.0, "--min-p", 1) == greedy
    assert text("--temperature", 3.0, "--top-p", 0.0001) == greedy
    assert text(*hot) == text(*hot) != greedy
    assert text(*hot) != text("--temperature", 3.0, "--seed", 2)


@needs_llamacpp
def test_chat_remembers(files: tuple[Path, Path], ask: Ask) -> None:
    options = "--temperature", 0, "--max-new-tokens", 8
    done = ask("chat", files[1], *options, input="Hello\nAnd you?\n")
    assert done.returncode == 0 and done.stderr.count("tokens read") == 2, done.stderr
    again = ask("chat", files[1], *options, input="And you?\n")
    assert again.stdout and again.stdout not in done.stdout


@needs_llamacpp
def test_a_prompt_beyond_the_context_is_one_error(files: tuple[Path, Path], ask: Ask) -> None:
    done = ask("generate", files[0], "word " * 20_000)
    assert done.returncode == 2 and "context" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""
    done = ask("generate", files[0], "To be", "--max-new-tokens", 100_000)
    assert done.returncode == 0 and done.stderr.endswith("and the context is full\n")


@needs_llamacpp
@pytest.mark.parametrize("wait", [0.0, 0.013, 0.029, 0.05])  # seconds after the first piece
def test_ctrl_c_ends_it(files: tuple[Path, Path], ask: Ask, wait: float) -> None:
    command = [sys.executable, "-m", "mkaq", "generate", files[0], "To be", "--max-new-tokens", 100_000]
    process = subprocess.Popen(
        [*map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's `&` ignores it
    )
    assert process.stdout is not None and process.stdout.read(8)
    time.sleep(wait)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75 and error.decode().splitlines()[0] == "mkaq: interrupted"


@needs_llamacpp
def test_what_is_no_model_is_one_error(files: tuple[Path, Path], ask: Ask, tmp_path: Path) -> None:
    whole = files[0].read_bytes()
    for name, data in (
        ("empty", b""),
        ("text", b"hello" * 99),
        ("cut", whole[:5000]),
        ("short", whole[:-5000]),
    ):
        bad = tmp_path / f"{name}.gguf"
        bad.write_bytes(data)
        done = ask("generate", bad, "To be")
        assert done.returncode == 4 and done.stderr.startswith(f"mkaq: {bad}"), done.stderr
        assert done.stderr.count("mkaq: ") == 1 and "Traceback" not in done.stderr, done.stderr
    done = ask("chat", files[0], input="Hello\n")
    assert done.returncode == 2 and "no chat template" in done.stderr


def test_what_is_missing_is_named(
    files: tuple[Path, Path], mkaq: Mkaq, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one_message(mkaq("generate", tmp_path / "no.gguf", "To be"), 2, "no.gguf", "no such file")
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    one_message(mkaq("generate", files[0], "To be"), 2, "pip install 'mkaq[llamacpp]'")
