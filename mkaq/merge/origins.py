"""mkaq-origins.json: for every layer of a fused model, the origins of its heads and channels."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from mkaq.errors import VerificationError
from mkaq.merge.channels import FusedLayer

ORIGINS = "mkaq-origins.json"

Origins = dict[str, dict[str, list[int]]]  # "heads" and "channels": old layer -> numbers in that layer


def origins_of(layer: FusedLayer) -> Origins:
    """The origins of a layer's parts by old layer, as plain data."""
    return {"heads": _by_layer(layer.heads), "channels": _by_layer(layer.channels)}


def write_origins(path: Path, layers: Sequence[Origins]) -> None:
    """Writes the origins of all layers, one line per layer."""
    lines = ",\n".join(json.dumps(layer, separators=(",", ":")) for layer in layers)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def read_origins(path: Path) -> list[Origins]:
    """Reads a file written by `write_origins`.

    Raises:
        VerificationError: If the file is missing or malformed.
    """
    try:
        layers = json.loads(path.read_text(encoding="utf-8"))
        for layer in layers:
            for kind in ("heads", "channels"):
                as_tensor(layer[kind])
    except (
        OSError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        ValueError,
        RecursionError,
    ) as error:
        raise VerificationError(f"is damaged: {error}", where=path) from None
    return list(layers)


def as_tensor(parts: dict[str, list[int]]) -> torch.Tensor:
    """Old layer and number of every part, in the new layer's order, shape (count, 2)."""
    rows = [(int(layer), int(number)) for layer, numbers in parts.items() for number in numbers]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)


def shares(layer: FusedLayer) -> dict[int, float]:
    """For each old layer of the group, the fraction of the new layer's channels taken from it."""
    return {old: float((layer.channels[:, 0] == old).sum()) / len(layer.channels) for old in layer.group}


def _by_layer(parts: torch.Tensor) -> dict[str, list[int]]:
    return {str(old): parts[parts[:, 0] == old, 1].tolist() for old in sorted(set(parts[:, 0].tolist()))}
