"""What docs/deploy.md says loads an artifact, does."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

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
def artifact(tmp_path_factory: pytest.TempPathFactory, model: Path, text: Path) -> Path:
    """An artifact in the formats that these runtimes read."""
    folder = tmp_path_factory.mktemp("deployed")
    quantize = {"method": "gptq", "bits": 4, "group_size": 32}
    sections: dict[str, Any] = {"quantize": quantize, "evaluate": None}
    sections["export"] = {"formats": ["safetensors", "compressed-tensors", "mlx"]}
    recipe = write_recipe(folder / "r.yaml", model, text, **sections)
    return run_quietly(recipe, folder / "run") / "artifact"


@pytest.mark.parametrize(
    ("folder", "name"), [('"ARTIFACT"', "loader"), ("/compressed-tensors", "compressed")]
)
def test_transformers(folder: str, name: str, artifact: Path, tmp_path: Path) -> None:
    first, *loads = BLOCKS["transformers"].splitlines()
    load = next(line for line in loads if folder in line).replace("ARTIFACT", str(artifact))
    program = f"{first}\n{load}\nassert type(model).__name__ == 'LlamaForCausalLM'"
    subprocess.run([environment(name) / "python", "-c", program], check=True, cwd=tmp_path, timeout=300)


def test_mlx(artifact: Path, tmp_path: Path) -> None:
    bin_folder = environment("mlx")
    program, *options = shlex.split(BLOCKS["MLX"].replace("ARTIFACT", str(artifact)))
    done = subprocess.run(
        [bin_folder / program, *options], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0 and "Generation:" in done.stdout, done.stderr
