"""Files made to harm: that have no end, stand for far more than they are, hold code, or steer a terminal."""

import gzip
import json
import lzma
import os
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mkaq.calibrate.text import read_text
from mkaq.console import printable
from mkaq.errors import UsageError
from tests.bad_input.damage import (
    INDEX,
    SHARDS,
    SINGLE,
    UP,
    Damage,
    change_bytes,
    change_header,
    change_tensors,
    shard,
)
from tests.runs import Mkaq, Outcome, forge, one_message, tree
from tests.tiny import edit_config

MB = 1 << 20
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"
NO_CONTROLS = re.compile("[^\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]*")
PICKLES = ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pth", "model.pkl")


def named_twice(data: bytes) -> bytes:
    """Another weight under a name that comes once more in the header."""
    size = int.from_bytes(data[:8], "little")
    other = UP.replace("layers.1", "layers.0").encode()
    header = data[8 : 8 + size].replace(b'"' + other + b'"', b'"' + UP.encode() + b'"')
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def gap(header: Any) -> None:
    """Bytes between two tensors that belong to none."""
    last = max(header, key=lambda name: header[name].get("data_offsets", [0])[0])
    begin, end = header[last]["data_offsets"]
    header[last]["data_offsets"] = [begin + 2, end + 2]


def outside(name: str) -> Damage:
    """Makes a file of the model a link to one outside."""

    def damage(folder: Path) -> None:
        if name in (INDEX, SHARDS[0]):
            shard(folder)
        (folder / name).rename(folder.parent / "outside")
        (folder / name).symlink_to(folder.parent / "outside")

    return damage


def instead_of(name: str, make: Callable[[Path], object]) -> Damage:
    """Puts something else in the place of a file."""

    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return damage


def sparse(path: Path) -> None:
    """A file of 10 TB that takes no disk."""
    path.touch()
    os.truncate(path, 10**13)


def both(folder: Path) -> None:
    """Shards with an index, and beside them one file with other weights."""
    single = (folder / SINGLE).read_bytes()
    shard(folder)
    (folder / SINGLE).write_bytes(single)


HOSTILE: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "a name twice": (change_bytes(named_twice), (SINGLE, "not a whole safetensors file")),
    "a gap": (change_header(gap), (SINGLE, "not a whole safetensors file")),
    "a header of 10 TB": (
        change_bytes(lambda data: (10**13).to_bytes(8, "little") + data[8:]),
        (SINGLE, "not a whole safetensors file"),
    ),
    "a name that steers a terminal": (
        change_tensors(lambda t: t.update({f"evil{ESCAPES}": t[UP].clone()})),
        (SINGLE, "control characters", "\\x1b]0;owned"),
    ),
    "a file that steers a terminal": (lambda f: shard(f, **{UP: f"{ESCAPES}.safetensors"}), (INDEX, "\\x1b")),
    "a family that steers a terminal": (
        lambda f: edit_config(f, model_type=f"llama{ESCAPES}", auto_map={"AutoModel": "x.y"}),
        ("config.json",),
    ),
    "an index beside one file": (both, (INDEX, f"leaves out {SINGLE}", "fix: delete")),
    "weights are a link": (outside(SINGLE), (SINGLE, "leaves the folder")),
    "a shard is a link": (outside(SHARDS[0]), (SHARDS[0], "leaves the folder")),
    "the index is a link": (outside(INDEX), (INDEX, "leaves the folder")),
    "config is a link": (outside("config.json"), ("config.json", "leaves the folder")),
    "config is a device": (
        instead_of("config.json", lambda path: path.symlink_to("/dev/zero")),
        ("config.json", "leaves the folder"),
    ),
    "config is a pipe": (instead_of("config.json", os.mkfifo), ("config.json", "is missing")),
    "config is a folder": (instead_of("config.json", Path.mkdir), ("config.json", "is missing")),
    "config has no end": (instead_of("config.json", sparse), ("config.json", "larger than 100")),
    "the index is a pipe": (instead_of(INDEX, os.mkfifo), ()),
    "the index has no end": (instead_of(INDEX, sparse), (INDEX, "larger than 100")),
    "weights are a pipe": (instead_of(SINGLE, os.mkfifo), ("no weights",)),
    "weights are a hole": (instead_of(SINGLE, sparse), (SINGLE, "not a whole safetensors file")),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_checkpoint(
    case: str, broken: Callable[[Damage], Path], refused: Callable[..., Outcome], mkaq: Mkaq
) -> None:
    damage, words = HOSTILE[case]
    path = broken(damage)
    if not words:  # it is as if it were not there
        assert mkaq("generate", path, "x", "--max-new-tokens", 1).code == 0
        return
    outcome = refused(4, str(path), *words, model={"path": str(path)})
    assert NO_CONTROLS.fullmatch(outcome.err)


def test_pickles_and_code_beside_the_weights_are_left_where_they_are(
    broken: Callable[[Damage], Path], recipe: Callable[..., Path], mkaq: Mkaq, tmp_path: Path
) -> None:
    canary = tmp_path / "executed"

    def beside(folder: Path) -> None:
        for name in PICKLES:
            (folder / name).write_bytes(f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode())
        for name in ("sitecustomize.py", "conftest.py", "modeling_llama.py", "__init__.py"):
            (folder / name).write_text(f"open({str(canary)!r}, 'w')\n")

    path = broken(beside)
    outcome = mkaq("run", recipe(model={"path": str(path)}), "--output", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert mkaq("generate", path, "x", "--max-new-tokens", 1).code == 0
    assert mkaq("verify", tmp_path / "run" / "artifact", "--source", path).code == 0
    assert not canary.exists()
    written = {Path(name).suffix for name in tree(tmp_path / "run")}
    assert written & {".py", ".bin", ".pt", ".pth", ".pkl"} == set()
    eval_pickle = f"import pickle; pickle.load(open({str(path / PICKLES[0])!r}, 'rb'))"
    exec(eval_pickle)  # the canary would sing: the same bytes, opened
    assert canary.exists()


# --- text --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "opened"), [(".gz", gzip.open), (".xz", lzma.open)])
def test_decompression_bomb(
    suffix: str,
    opened: Any,
    recipe: Callable[..., Path],
    mkaq: Mkaq,
    tmp_path: Path,
) -> None:
    """65 MiB from a few KB: refused before memory is taken for it."""
    path = tmp_path / f"bomb.jsonl{suffix}"
    with opened(path, "wb") as handle:
        for _ in range(65):
            handle.write(b"{" + b" " * (MB - 1))
    assert path.stat().st_size < MB
    section = {"dataset": "jsonl", "path": str(path), "num_samples": 8, "max_seq_length": 32}
    outcome = mkaq("run", recipe(calibration=section, evaluate=None), "--output", tmp_path / "run")
    one_message(outcome, 2, str(path), "decompresses to more than 67.11 MB")
    tracemalloc.start()
    try:
        with pytest.raises(UsageError):
            read_text(path)
        assert tracemalloc.get_traced_memory()[1] < 16 * MB  # xz looks back over 8 MiB
    finally:
        tracemalloc.stop()


def test_text_that_shrinks_well_is_no_bomb(tmp_path: Path) -> None:
    path = tmp_path / "same.txt.gz"
    path.write_bytes(gzip.compress(b"the same again. " * MB))  # 16 MiB, a thousand times its size
    assert len(read_text(path)) == 16 * MB


# --- recipes and manifests ---------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/dev/full"])
def test_recipe_that_is_a_device(path: str, refused: Callable[..., Outcome]) -> None:
    refused(2, path, path=path)


def test_recipe_that_has_no_end(tmp_path: Path, refused: Callable[..., Outcome]) -> None:
    sparse(tmp_path / "r.yaml")
    refused(2, "r.yaml: is larger than 1.00 MB", path=tmp_path / "r.yaml")


ESCAPED = json.dumps(f"x{ESCAPES}")
STEERING = {
    "key": f"version: 1\nname: x\nmodel: {{path: m}}\n{ESCAPED}: 1\n",
    "name": f"version: 1\nname: {ESCAPED}\nmodel: {{path: m}}\nquantize: {{method: bitsandbytes}}\n",
    "path": f"version: 1\nname: x\nmodel: {{path: {ESCAPED}}}\nquantize: {{method: bitsandbytes}}\n",
    "value": f"version: 1\nname: x\nmodel: {{path: m}}\nquantize: {{method: {ESCAPED}}}\n",
}


@pytest.mark.parametrize("case", STEERING)
def test_recipe_that_steers_a_terminal(case: str, tmp_path: Path, refused: Callable[..., Outcome]) -> None:
    (tmp_path / "r.yaml").write_text(STEERING[case])
    outcome = refused(2, path=tmp_path / "r.yaml")
    assert NO_CONTROLS.fullmatch(outcome.err) and "\\x1b" in outcome.err


def test_manifest_that_steers_a_terminal(copy: Path, mkaq: Mkaq) -> None:
    forge(copy / "artifact", lambda manifest: manifest["source"].update(path=f"m{ESCAPES}"))
    for command in ("inspect", "verify"):
        outcome = mkaq(command, copy / "artifact")
        assert NO_CONTROLS.fullmatch(outcome.out + outcome.err), command
    assert "m\\x1b]0;owned" in mkaq("inspect", copy / "artifact").out


def test_what_people_write_is_printed_as_it_is() -> None:
    plain = "naïve café, 数字, עברית, \U0001f468‍\U0001f469‍\U0001f467\n\ttab ± 1 % caf\udce9"
    assert printable(plain) == plain
    assert printable("a\x1b[2J\r\x7f\x9b") == "a\\x1b[2J\\r\\x7f\\x9b"
