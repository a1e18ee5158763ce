"""Layers that a long stage has finished: kept until it is published, and used if it is stopped."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.shapes import write_checkpoint
from mkaq.checkpoint.finished import Finished
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.plan import plan_run
from mkaq.ranks import ALONE
from mkaq.recipe import Recipe
from mkaq.recover import layerwise
from tests.runs import Mkaq, tree
from tests.test_shapes import TINY
from tests.tiny import CHANNELS

pytestmark = pytest.mark.usefixtures("one_thread")
GPTQ = {"method": "gptq", "group_size": 32}
RECOVER = {"method": "layerwise", "steps": 3, "batch_size": 4}


def test_a_layer_is_found_as_it_was_kept(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5).bfloat16(), "b": torch.tensor(2.0)}
    Finished(tmp_path / "kept", ALONE).keep(7, tensors, {"error": 0.1})
    found = Finished(tmp_path / "kept", ALONE).find(7)
    assert found is not None and found[1] == {"error": 0.1}
    assert all(torch.equal(found[0][name], tensor) for name, tensor in tensors.items())
    assert Finished(tmp_path / "kept", ALONE).find(6) is None
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["00007.safetensors"]


@pytest.mark.parametrize("damage", ["flip", "cut", "blank", "empty"])
def test_a_damaged_layer_is_not_there(damage: str, tmp_path: Path) -> None:
    finished = Finished(tmp_path / "kept", ALONE)
    finished.keep(0, {"a": torch.randn(30)}, None)
    file = tmp_path / "kept" / "00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    size = len(data)
    file.write_bytes({"flip": data, "cut": data[:-9], "blank": bytes(size), "empty": b""}[damage])
    assert finished.find(0) is None


def test_nothing_is_kept_without_a_folder() -> None:
    finished = Finished(None, ALONE)
    finished.keep(0, {"a": torch.ones(1)}, None)
    assert finished.find(0) is None


@pytest.fixture
def stopped(
    recipe: Callable[..., Path], mkaq: Mkaq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, list[int]]:
    """A recipe whose run in `run` was stopped while it tuned layer 2, and the layers tuned since."""
    written = recipe(merge=CHANNELS, recover=RECOVER)
    tune, tuned, at = layerwise.tune, list[int](), [2]

    def noted(walk: Any, layer: Any, new: int, *others: Any) -> Any:
        tuned.append(new)
        if [new] == at:
            at.clear()
            raise KeyboardInterrupt
        return tune(walk, layer, new, *others)

    monkeypatch.setattr(layerwise, "tune", noted)
    monkeypatch.setattr("mkaq.session.LONG", -1.0)
    assert mkaq("run", written, "--output", tmp_path / "run").code == 75
    assert tuned == [0, 1, 2]
    tuned.clear()
    return written, tuned


def kept(folder: Path) -> list[Path]:
    return list(folder.glob("store/.recover-*.finished/*"))


def test_a_stopped_stage_goes_on_after_its_last_layer(
    stopped: tuple[Path, list[int]], mkaq: Mkaq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, tuned = stopped
    assert len(kept(tmp_path / "run")) == 2
    monkeypatch.setattr("mkaq.session.LONG", 600.0)  # the machine may be less busy now
    outcome = mkaq("run", written, "--output", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert tuned == [2] and not list(tmp_path.glob("run/store/.*"))
    assert mkaq("run", written, "--output", tmp_path / "whole").code == 0
    assert tree(tmp_path / "run" / "artifact") == tree(tmp_path / "whole" / "artifact")


def test_fresh_and_another_recipe_tune_every_layer(
    stopped: tuple[Path, list[int]], mkaq: Mkaq, tmp_path: Path
) -> None:
    written, tuned = stopped
    folder = tmp_path / "run"
    other = mkaq("run", written, "--output", folder, "--set", "recover.steps=2", "--until", "recover")
    assert other.code == 0, other.err
    assert tuned == [0, 1, 2] and len(kept(folder)) == 2
    tuned[:] = [9]
    assert mkaq("run", written, "--output", folder, "--fresh", "--until", "recover").code == 0
    assert tuned == [9, 0, 1, 2] and kept(folder) == []


FITTED = {**GPTQ, "bits": 8, "target": "source"}
SCATTERED = {**GPTQ, "bits": 3, "sym": False, "desc_act": True}
PARTS = [  # a stage, what makes one of its parts, and a recipe's sections
    ("analyze", "mkaq.merge.cost.fuse", {"merge": CHANNELS}),
    ("analyze", "mkaq.merge.cost.best_average", {"merge": {**CHANNELS, "fuse": "average"}}),
    ("merge", "mkaq.merge.fused.fuse", {"merge": CHANNELS}),
    ("quantize", "mkaq.quantize.gptq_layers.solve_layer", {"merge": None, "quantize": SCATTERED}),
    ("quantize", "mkaq.quantize.gptq_layers.solve_layer", {"merge": CHANNELS, "quantize": FITTED}),
]


@pytest.mark.parametrize(("stage", "part", "sections"), PARTS)
def test_every_long_stage_goes_on_after_its_last_part(
    stage: str,
    part: str,
    sections: dict[str, Any],
    recipe: Callable[..., Path],
    mkaq: Mkaq,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written, (module, _, name) = recipe(**sections), part.rpartition(".")
    make, made, last = getattr(import_module(module), name), list[int](), [-1]

    def counted(*arguments: Any) -> Any:
        if len(made) == last[0]:
            raise KeyboardInterrupt
        made.append(0)
        return make(*arguments)

    monkeypatch.setattr(part, counted)
    assert mkaq("run", written, "--output", tmp_path / "whole").code == 0
    last[:], total = [len(made) - 1], len(made)
    made.clear()
    monkeypatch.setattr("mkaq.session.LONG", -1.0)
    assert mkaq("run", written, "--output", tmp_path / "run").code == 75
    assert total > 1 and len(list(tmp_path.glob(f"run/store/.{stage}-*.finished/*"))) == total - 1
    made.clear()
    outcome = mkaq("run", written, "--output", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert len(made) == 1 and not list(tmp_path.glob("run/store/.*"))
    assert tree(tmp_path / "run" / "artifact") == tree(tmp_path / "whole" / "artifact")


def test_clean_frees_what_was_kept(stopped: tuple[Path, list[int]], mkaq: Mkaq, tmp_path: Path) -> None:
    outcome = mkaq("clean", tmp_path / "run", "--yes")
    assert outcome.code == 0 and kept(tmp_path / "run") == [], outcome.err


def test_plan_counts_what_is_kept(tmp_path: Path) -> None:
    """A merged model's layers lie twice on the disk before it is published; averages are not kept."""
    write_checkpoint(tmp_path, "llama3-8b", 8, **{**TINY, "vocab_size": 256})
    calibration = {"num_samples": 8, "max_seq_length": 8}
    sections = {"calibration": calibration, "quantize": {**GPTQ, "bits": 2}, "recover": None}
    disk = []
    for fuse in ("channels", "average"):
        data = {"version": 1, "name": "x", "model": {"path": str(tmp_path)}, **sections}
        recipe = Recipe.model_validate({**data, "merge": {**CHANNELS, "fuse": fuse}})
        plan = plan_run(recipe, open_checkpoint(tmp_path), torch.device("cpu"))
        disk.append(plan.disk_bytes)
    _, merged, quantized = (size.bytes for size in plan.sizes)
    assert disk[0] - disk[1] == merged - 2 * quantized > 0
