"""An artifact that is changed in any way is not verified; a copy that is not changed is.

A few here; `MKAQ_EVERY=1 make test-reliability` makes 500 changes.
"""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.counts import CHANGES as FOUND
from tests.reliability.test_stops import EVERY
from tests.runs import Mkaq

pytestmark = pytest.mark.usefixtures("one_thread")


def flip(file: Path, other: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def delete(file: Path, other: Path, rng: random.Random) -> None:
    file.unlink()


def swap(file: Path, other: Path, rng: random.Random) -> None:
    first, second = file.read_bytes(), other.read_bytes()
    file.write_bytes(second)
    other.write_bytes(first)


def cut(file: Path, other: Path, rng: random.Random) -> None:
    os.truncate(file, rng.randrange(file.stat().st_size))


def lengthen(file: Path, other: Path, rng: random.Random) -> None:
    with file.open("ab") as end:
        end.write(bytes(rng.randrange(1, 100)))


def add(file: Path, other: Path, rng: random.Random) -> None:
    """A hidden file beside the weights, such as .git, is nobody's business."""
    file.with_name(f"x{rng.choice(['', '.bin', '.py', '.safetensors'])}").write_bytes(rng.randbytes(20))


def link(file: Path, other: Path, rng: random.Random) -> None:
    moved = file.parent.parent / "elsewhere"
    moved.write_bytes(file.read_bytes()[:-1] + b"!!")
    file.unlink()
    file.symlink_to(moved)


CHANGES = [flip] * 12 + [delete, swap, swap, cut, cut, lengthen, add, link]


@pytest.fixture(scope="module")
def artifact(runs: list[Path]) -> Path:
    """An artifact in two formats. Not to be changed."""
    return runs[2] / "artifact"


@pytest.mark.parametrize("part", range(20))
def test_every_change_is_found(
    part: int, artifact: Path, mkaq: Mkaq, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    missed, numbers = [], range(part * 25, part * 25 + 25, EVERY)
    for number in numbers:
        rng, folder = random.Random(number), tmp_path / "changed" / "artifact"
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(artifact, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
        file, other = rng.sample(files, 2)
        change: Callable[[Path, Path, random.Random], None] = rng.choice(CHANGES)
        change(file, other, rng)
        outcome = mkaq("verify", folder)
        if outcome.code not in (4, 5) or "fault of mkaq" in outcome.err:
            name = file.relative_to(folder)
            missed.append(f"{number}: {change.__name__} {name}: {outcome.code} {outcome.err[-200:]}")
    assert missed == []
    record_property(FOUND, len(numbers))


def test_a_copy_with_other_times_and_in_another_order_is_verified(
    artifact: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    files = sorted((path for path in artifact.rglob("*") if path.is_file()), reverse=True)
    for number, file in enumerate(files):
        copied = tmp_path / "copied" / file.relative_to(artifact)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes(file.read_bytes())
        os.utime(copied, (number, number))
        copied.chmod(0o600)
    outcome = mkaq("verify", tmp_path / "copied")
    assert outcome.code == 0, outcome.err
