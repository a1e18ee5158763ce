"""Random GPTQ checkpoints for the tests of exports."""

import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mkaq.checkpoint.reader import Checkpoint
from mkaq.checkpoint.validate import open_checkpoint
from tests import tiny


def make_gptq(
    folder: Path,
    family: str = "llama",
    *,
    bits: int = 4,
    group_size: int = 32,
    sym: bool = True,
    **changes: Any,
) -> Checkpoint:
    """Writes a tiny model of a family below a folder, and as a GPTQ checkpoint, which is opened."""
    dense = tiny.make_model(folder / "dense", family, layers=2, **changes)
    return open_checkpoint(tiny.make_gptq(folder / "gptq", dense, bits, group_size, sym=sym), quantized=True)


def decoded_by(
    worker: str,
    python: Path,
    options: Sequence[Mapping[str, Any]],
    export: Callable[[Checkpoint, Path], Path],
    ids: torch.Tensor,
    folder: Path,
) -> Iterator[tuple[Mapping[str, Any], Checkpoint, dict[str, torch.Tensor]]]:
    """Exports a random GPTQ model for each set of options, and runs all in an environment of its own.

    Yields:
        The options, the model, and the weights and `logits` that the worker's library has found.
    """
    models, folders = [], []
    for number, option in enumerate(options):
        (folder / str(number)).mkdir()
        models.append(make_gptq(folder / str(number), **option))
        folders.append(export(models[-1], folder / str(number) / "out"))
        save_file({"ids": ids}, f"{folders[-1]}.ids")
    script = Path(__file__).parent / worker
    done = subprocess.run([python, script, *folders], capture_output=True, text=True, cwd=folder, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for option, model, made in zip(options, models, folders, strict=True):
        yield option, model, load_file(f"{made}.safetensors")
