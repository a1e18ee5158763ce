"""The formats that an artifact may have beside safetensors, each in a folder of its own name."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from mkaq.checkpoint.reader import Checkpoint
from mkaq.export import compressed_tensors, gguf, mlx
from mkaq.export.settings import Settings


class Export(Protocol):
    """A format that holds the same codes and weights as an artifact's safetensors."""

    NAME: str
    """Its name in the recipe."""

    def refusal(self, model: Checkpoint, quantization: Mapping[str, Any] | None) -> str:
        """Why it cannot hold a model, as far as its configuration tells; empty if it can.

        Args:
            model: The model, or the one that it will be made from.
            quantization: Its quantization_config; None for a dense model.
        """

    def write(self, model: Checkpoint, folder: Path, settings: Settings) -> None:
        """Writes its files, one tensor in memory at a time; the same bytes for the same model.

        Args:
            model: The artifact's model, dense or GPTQ.
            folder: An empty folder.
            settings: What the files say beside the model.

        Raises:
            UnsupportedError: If the format cannot hold the model exactly.
            CheckpointError: If the model is damaged.
        """

    def check(self, model: Checkpoint, folder: Path, settings: Settings) -> Iterator[str]:
        """Compares the files with the model that they were made from, bit for bit.

        Args:
            model: The artifact's model.
            folder: The files; nothing in them is trusted.
            settings: As for `write`.

        Yields:
            A sentence for each fault.
        """


EXPORTS: Mapping[str, Export] = {each.NAME: each for each in (gguf, compressed_tensors, mlx)}
