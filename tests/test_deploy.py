"""What docs/deploy.md says loads an artifact, does; vLLM and ONNX Runtime GenAI write what it means."""

import json
import os
import re
import shlex
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest

from benchmarks.runtimes import WORKERS, answers, inputs, row_of, truth_of
from tests.runs import python_of, run_quietly
from tests.tiny import write_recipe

ROOT = Path(__file__).parent.parent
BLOCKS = dict(
    re.findall(r"^## ([^\n]+)\n+```\w+\n(.*?)```", (ROOT / "docs/deploy.md").read_text(), re.DOTALL | re.M)
)


def environment(name: str) -> Path:
    """The folder of the programs of a runtime's environment; without it the test skips."""
    python = python_of(name)
    if not python.exists():
        pytest.skip(f"no {name} at {python} (make .venv-{name}/ready makes it)")
    return python.parent


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """The built-in model with 4 bits, in the formats that these runtimes read."""
    folder = tmp_path_factory.mktemp("deployed")
    quantize = {"method": "gptq", "bits": 4, "group_size": 128}
    sections: dict[str, Any] = {"merge": None, "quantize": quantize, "evaluate": None}
    sections["export"] = {"formats": ["safetensors", "compressed-tensors", "mlx"]}
    recipe = write_recipe(folder / "r.yaml", Path("builtin:tiny-llama"), text, **sections)
    return run_quietly(recipe, folder / "run") / "artifact"


@pytest.mark.parametrize(
    ("folder", "name"), [('"ARTIFACT"', "loader"), ("/compressed-tensors", "compressed")]
)
def test_transformers(folder: str, name: str, artifact: Path, tmp_path: Path) -> None:
    first, *loads = BLOCKS["transformers"].splitlines()
    load = next(line for line in loads if folder in line).replace("ARTIFACT", str(artifact))
    program = f"{first}\n{load}\nassert type(model).__name__ == 'LlamaForCausalLM'"
    subprocess.run([environment(name) / "python", "-c", program], check=True, cwd=tmp_path, timeout=300)


def test_onnx(artifact: Path, tmp_path: Path) -> None:
    bin_folder = environment("onnx")
    command = BLOCKS["ONNX Runtime GenAI"].replace("\\\n", "").replace("ARTIFACT", str(artifact))
    program, *options = shlex.split(command)
    subprocess.run([bin_folder / program, *options], check=True, cwd=tmp_path, timeout=300)
    assert (tmp_path / "onnx" / "genai_config.json").is_file()


@pytest.mark.parametrize("number", [0, 1])
def test_vllm(number: int, artifact: Path, tmp_path: Path) -> None:
    bin_folder = environment("vllm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    program, *options = shlex.split(BLOCKS["vLLM"].splitlines()[number].replace("ARTIFACT", str(artifact)))
    request = {"model": options[-1], "prompt": "To be"}
    options += ["--host", "127.0.0.1", "--port", address.partition(":")[2], "--enforce-eager"]
    environ = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen([bin_folder / program, *options], stdout=log, stderr=log, env=environ) as server,
    ):
        try:
            answer = asked(f"http://{address}/v1/completions", request, server)
        finally:
            server.terminate()
    assert answer["usage"]["completion_tokens"] > 0, (tmp_path / "log").read_text()[-3000:]


def asked(url: str, request: dict[str, Any], server: subprocess.Popen[bytes]) -> dict[str, Any]:
    """What a server answers as soon as it is up."""
    data, headers = json.dumps(request).encode(), {"Content-Type": "application/json"}
    for _ in range(300):
        assert server.poll() is None
        with suppress(URLError), urlopen(Request(url, data, headers), timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
        time.sleep(1)
    raise TimeoutError(url)


@pytest.mark.parametrize("runtime", ["vllm", "onnx"])
def test_the_same_text(runtime: str, artifact: Path) -> None:
    python, worker = environment(runtime) / "python", WORKERS[runtime]
    ids, prompts = inputs(artifact)
    truth = truth_of(artifact, ids, prompts)
    folders = [artifact] + [artifact / "compressed-tensors"] * ("compressed-tensors" in worker.formats)
    told = answers(str(python), worker.script, list(map(str, folders)), ids, prompts, worker.exact or "auto")
    rows = {folder: row_of({}, runtime, answer, truth) for folder, answer in told}
    assert len(rows) == len(folders)
    for row in rows.values():
        assert row["loads"] and row["agrees"], rows
        assert row["difference"] < 0.005 and max(row["gaps"]) < 0.01, rows


def test_mlx(artifact: Path, tmp_path: Path) -> None:
    bin_folder = environment("mlx")
    program, *options = shlex.split(BLOCKS["MLX"].replace("ARTIFACT", str(artifact)))
    done = subprocess.run(
        [bin_folder / program, *options], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0 and "Generation:" in done.stdout, done.stderr
