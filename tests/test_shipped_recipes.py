"""Every shipped recipe, on a toy as deep as its model, with 1, 2, 4 and 8 processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mkaq.manifest import read_manifest
from mkaq.shipped import shipped_recipes
from tests.recipes_worker import DEPTHS, settings_of, toy_of
from tests.runs import ROOT, Mkaq
from tests.tiny import make_model

RECIPES = sorted(path.stem for path, _ in shipped_recipes())
WIDTH = {"hidden_size": 128, "intermediate_size": 256}
FAMILY = {"mistral_7b": "mistral", "qwen2_5_7b": "qwen2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy for each depth: a group of 128 weights fits its layers."""
    folder = tmp_path_factory.mktemp("shipped")
    for name, layers in DEPTHS.items():
        changes = WIDTH | ({"max_window_layers": layers} if name == "qwen2_5_7b" else {})
        make_model(folder / "models" / name, FAMILY.get(name, "llama"), layers, **changes)
    return folder


def run_all(folder: Path, processes: int, recipes: list[str]) -> None:
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command += ["tests.recipes_worker", str(folder), *recipes]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    for recipe in recipes:
        artifact = folder / f"runs-{processes}" / recipe / "artifact"
        manifest = read_manifest(artifact)
        alone = manifest.recipe["merge"] is None and manifest.recipe["quantize"]["method"] == "bitsandbytes"
        told = {
            ran.processes
            for stage, ran in manifest.ran_on.items()
            if not stage.startswith(("evaluate", "residuals"))
        }
        assert told == {1 if alone else processes}


def same_groups(folder: Path, processes: int, recipe: str) -> bool:
    plans = [
        json.loads((folder / f"runs-{size}" / recipe / "merge" / "record.json").read_text())
        for size in (1, processes)
    ]
    return [list(layer["from"]) for layer in plans[0]["layers"]] == [
        list(layer["from"]) for layer in plans[1]["layers"]
    ]


@pytest.mark.long
def test_deepest_recipe_with_more_processes_than_probes(folder: Path) -> None:
    """80 layers leave one probe of 128 samples: it was refused with two processes."""
    run_all(folder, 4, ["llama3_70b_int4"])


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_every_recipe(processes: int, folder: Path) -> None:
    run_all(folder, processes, RECIPES)
    if processes > 1:
        assert same_groups(folder, processes, "llama3_8b_paper")


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_plan_has_no_objection(processes: int, folder: Path, mkaq: Mkaq) -> None:
    for recipe in RECIPES:
        model = folder / "models" / toy_of(recipe)
        settings = [word for setting in settings_of(recipe, model) for word in ("--set", setting)]
        outcome = mkaq("plan", recipe, *settings, "--processes", processes)
        assert outcome.code == 0, outcome.err
        assert "have nothing to do" not in outcome.out
