"""mkaq-origins.json: for every layer of a fused model, which heads and channels came from where."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from mkaq.errors import VerificationError
from mkaq.merge.channels import FusedLayer

ORIGINS = "mkaq-origins.json"

Origins = dict[str, dict[str, list[int]]]  # heads and channels: old layer -> their numbers there


def origins_of(layer: FusedLayer) -> Origins:
    """The parts of a layer by old layer, as plain data."""
    return {"heads": _by_layer(layer.heads), "channels": _by_layer(layer.channels)}


def write_origins(path: Path, layers: Sequence[Origins]) -> None:
    """Writes the origins of all layers, one layer a line."""
    lines = ",\n".join(json.dumps(layer, separators=(",", ":")) for layer in layers)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def read_origins(path: Path) -> list[Origins]:
    """Reads what `write_origins` wrote.

    Raises:
        VerificationError: If it is no such file.
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
    """Old layer and number of every part, shape (count, 2), in the order of the new layer."""
    rows = [(int(layer), int(number)) for layer, numbers in parts.items() for number in numbers]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)


def shares(layer: FusedLayer) -> dict[int, float]:
    """For each old layer of the group the share of the new layer's channels that came from it."""
    return {old: float((layer.channels[:, 0] == old).sum()) / len(layer.channels) for old in layer.group}


def _by_layer(parts: torch.Tensor) -> dict[str, list[int]]:
    return {str(old): parts[parts[:, 0] == old, 1].tolist() for old in sorted(set(parts[:, 0].tolist()))}
