"""Random GPTQ checkpoints for the tests of exports."""

from pathlib import Path
from typing import Any

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
