"""Ways to damage a model's folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Damage = Callable[[Path], object]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
UP = "model.layers.1.mlp.up_proj.weight"
EMBED = "model.embed_tokens.weight"


def change_tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        edit(tensors)
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})

    return damage


def change_up(edit: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    """Replaces one weight matrix of the middle layer."""
    return change_tensors(lambda tensors: tensors.update({UP: edit(tensors[UP]).contiguous()}))


def change_bytes(edit: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: (folder / SINGLE).write_bytes(edit((folder / SINGLE).read_bytes()))


def change_header(edit: Callable[[Any], object]) -> Damage:
    """Lets the header of the weights say something else."""

    def damage(data: bytes) -> bytes:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        edit(header)
        encoded = json.dumps(header).encode()
        return len(encoded).to_bytes(8, "little") + encoded + data[8 + size :]

    return change_bytes(damage)


def shard(folder: Path, **places: Any) -> None:
    """Splits the weights into two files with an index; `places` go into its weight_map."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = sorted(tensors)
    halves = dict(zip(SHARDS, (names[:9], names[9:]), strict=True))
    for file, half in halves.items():
        save_file({name: tensors[name] for name in half}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, half in halves.items() for name in half}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map | places}))


def lose_shard(folder: Path) -> None:
    shard(folder)
    (folder / SHARDS[1]).unlink()


def swap_shards(folder: Path) -> None:
    shard(folder)
    swapped = json.loads((folder / INDEX).read_text())
    swapped["weight_map"][EMBED] = next(s for s in SHARDS if s != swapped["weight_map"][EMBED])
    (folder / INDEX).write_text(json.dumps(swapped))


def only_pickle(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
