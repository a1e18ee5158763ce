"""The runs that are stopped and the artifact that is changed."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.runs import run_quietly
from tests.tiny import CHANNELS, write_recipe

GPTQ = {"method": "gptq", "bits": 4, "group_size": 32}


@pytest.fixture(scope="package")
def runs(tmp_path_factory: pytest.TempPathFactory, model: Path, text: Path) -> list[Path]:
    """A recipe, a run before it with averages and other bits, its folder after both. Not to be changed."""
    folder = tmp_path_factory.mktemp("stops")
    more: dict[str, Any] = {"evaluate": None, "export": {"formats": ["safetensors", "gguf"]}}
    earlier = write_recipe(folder / "earlier.yaml", model, text, **more, quantize=GPTQ | {"bits": 8})
    tuned = {"merge": CHANNELS, "recover": {"method": "layerwise", "steps": 2}}
    recipe = write_recipe(folder / "recipe.yaml", model, text, **more, **tuned, quantize=GPTQ)
    before = run_quietly(earlier, folder / "before")
    whole = shutil.copytree(before, folder / "whole", symlinks=True)
    return [recipe, before, run_quietly(recipe, whole)]
