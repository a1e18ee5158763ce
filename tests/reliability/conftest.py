"""The runs that are stopped and the artifact that is changed."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.runs import run_quietly
from tests.tiny import write_recipe

GPTQ = {"method": "gptq", "bits": 4, "group_size": 32}


@pytest.fixture(scope="package")
def runs(tmp_path_factory: pytest.TempPathFactory, model: Path, text: Path) -> list[Path]:
    """A recipe, a run before it with other bits, and the same folder after it. Not to be changed."""
    folder = tmp_path_factory.mktemp("stops")
    more: dict[str, Any] = {"evaluate": None, "export": {"formats": ["safetensors", "gguf"]}}
    earlier = write_recipe(folder / "earlier.yaml", model, text, **more, quantize=GPTQ | {"bits": 8})
    recipe = write_recipe(folder / "recipe.yaml", model, text, **more, quantize=GPTQ)
    before = run_quietly(earlier, folder / "before")
    whole = shutil.copytree(before, folder / "whole", symlinks=True)
    return [recipe, before, run_quietly(recipe, whole)]
