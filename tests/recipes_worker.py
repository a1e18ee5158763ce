"""Runs every shipped recipe on toys of the depths that they are for, as one process of a group or alone.

usage: python -m tests.recipes_worker FOLDER RECIPE...
       torchrun --standalone --nproc-per-node N -m tests.recipes_worker FOLDER RECIPE...

FOLDER/models/NAME holds the toys; runs go to FOLDER/runs-N/RECIPE.
"""

import os
import sys
from pathlib import Path

import torch
import yaml

from mkaq import pipeline
from mkaq.errors import MkaqError
from mkaq.progress import Progress
from mkaq.ranks import joined
from mkaq.recipe_file import load_recipe
from mkaq.shipped import find_recipe

DEPTHS = {"llama3_70b": 80, "llama3_8b": 32, "mistral_7b": 32, "qwen2_5_7b": 28, "tiny_llama": 16}
SHORT = ["evaluate.perplexity.num_samples=5", "evaluate.perplexity.max_seq_length=32"]


def toy_of(recipe: str) -> str:
    """The name of the toy that stands for a recipe's model."""
    return next(name for name in DEPTHS if recipe.startswith(name))


def settings_of(recipe: str, model: Path) -> list[str]:
    """All but the length of texts and of tuning is as it ships: samples, ratios, groups and bits."""
    sections = yaml.safe_load(find_recipe(recipe).read_text())
    settings = [f"model.path={model}", *SHORT]
    settings += ["calibration.max_seq_length=16"] if "calibration" in sections else []
    return settings + (["recover.steps=2"] if sections.get("recover") else [])


def main() -> None:
    folder, recipes = Path(sys.argv[1]), sys.argv[2:]
    size = int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(1)
    with joined(torch.device("cpu")) as (ranks, device):
        for recipe in recipes:
            loaded = load_recipe(find_recipe(recipe), settings_of(recipe, folder / "models" / toy_of(recipe)))
            out = folder / f"runs-{size}" / recipe
            try:
                pipeline.run(loaded, out, device, Progress(quiet=True), ranks=ranks)
            except MkaqError as error:
                if ranks.is_main:
                    print(f"{recipe} with {size} processes: {error}", file=sys.stderr)
                sys.exit(1)


if __name__ == "__main__":
    main()
