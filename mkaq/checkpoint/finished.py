"""Parts that a stage has finished, kept until it is published: if it is stopped, it goes on after them.

A part is a layer, or whatever else a stage makes one after another.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mkaq.checkpoint.shard import checksum_of
from mkaq.files import sync
from mkaq.ranks import Ranks

Finding = tuple[dict[str, torch.Tensor], Any]


class Finished:
    """The finished parts of one stage.

    Args:
        folder: Where they are kept; None keeps none. That of the first process counts.
        ranks: The processes: the first one writes, all of them read.
    """

    def __init__(self, folder: Path | None, ranks: Ranks) -> None:
        place = ranks.broadcast(None if folder is None else str(folder))
        self._folder, self._ranks = None if place is None else Path(place), ranks

    @property
    def keeps(self) -> bool:
        """Whether parts are kept at all."""
        return self._folder is not None

    def find(self, part: int) -> Finding | None:
        """The tensors by name and the record of a part; None if some process does not see them whole."""
        if self._folder is None:
            return None
        found = _read(self._path(part))
        return None if self._ranks.maximum(float(found is None)) else found

    def keep(self, part: int, tensors: Mapping[str, torch.Tensor], record: Any) -> None:
        """Keeps a part's tensors, and its record as JSON; on disk when it returns."""
        if self._folder is None or not self._ranks.is_main:
            return
        self._folder.mkdir(exist_ok=True)
        checksums = {name: checksum_of(tensor) for name, tensor in tensors.items()}
        fresh = self._path(part).with_suffix(".new")
        save_file(dict(tensors), fresh, {"finished": json.dumps([record, checksums])})
        sync(fresh)
        fresh.rename(self._path(part))
        sync(self._folder)

    def _path(self, part: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{part:05}.safetensors"


def _read(path: Path) -> Finding | None:
    try:
        with safe_open(path, framework="pt") as handle:
            record, checksums = json.loads(handle.metadata()["finished"])
            tensors = {name: handle.get_tensor(name) for name in checksums}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    whole = all(checksum_of(tensor) == checksums[name] for name, tensor in tensors.items())
    return (tensors, record) if whole else None
