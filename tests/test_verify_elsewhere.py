"""An honest artifact passes `verify --source` on another machine: other threads, other types."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from mkaq.manifest import read_manifest
from tests.runs import Mkaq, forge
from tests.tiny import CHANNELS, write_recipe

RECOVER = {"method": "layerwise", "steps": 3, "batch_size": 4}
GPTQ = {"method": "gptq", "bits": 4, "group_size": 32}
RECIPES: dict[str, dict[str, Any]] = {
    "merged": {"quantize": None},
    "tuned": {"recover": RECOVER, "quantize": None},
    "rounded": {"quantize": GPTQ},
    "rounded toward the source": {"quantize": GPTQ | {"target": "source"}},
    "int8": {"recover": RECOVER, "quantize": {"method": "bitsandbytes", "bits": 8}},
}


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def made(case: str, model: Path, text: Path, mkaq: Mkaq, folder: Path) -> Path:
    calibration = {"dataset": "text", "path": str(text), "num_samples": 16, "max_seq_length": 32}
    sections = {"merge": CHANNELS, "evaluate": None, "calibration": calibration} | RECIPES[case]
    outcome = mkaq(
        "run", write_recipe(folder / "r.yaml", model, text, **sections), "--output", folder / "run"
    )
    assert outcome.code == 0, outcome.err
    return folder / "run" / "artifact"


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("case", RECIPES)
def test_streams_of_bfloat16_are_verified_in_float32(
    case: str, model: Path, text: Path, mkaq: Mkaq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an artifact that a GPU made is on a CPU."""
    torch.set_num_threads(1)
    monkeypatch.setattr("mkaq.run.job.compute_dtype", lambda *_, **__: torch.bfloat16)
    artifact = made(case, model, text, mkaq, tmp_path)
    monkeypatch.undo()
    ran = read_manifest(artifact).ran_on
    assert {on.compute_dtype for on in ran.values()} == {"bfloat16"} and ran["merge"].threads == 1
    torch.set_num_threads(2)
    verified = mkaq("verify", artifact, "--source", model)
    assert verified.code == 0, verified.err
    assert "the errors of hidden states that the manifest says" in verified.out


@pytest.mark.parametrize("case", RECIPES)
def test_nothing_is_chosen_again(
    case: str, model: Path, text: Path, mkaq: Mkaq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even with the same threads: what is chosen from sums of floats is no claim."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("chosen again")

    artifact = made(case, model, text, mkaq, tmp_path)
    for name in ("solve.keep_columns", "fused.fuse", "cost.fuse", "choose.cheapest_groups"):
        monkeypatch.setattr(f"mkaq.merge.{name}", refuse)
    monkeypatch.setattr("mkaq.fit.targets.fit", refuse)
    verified = mkaq("verify", artifact, "--source", model)
    assert verified.code == 0, verified.err


@pytest.mark.parametrize("case", ["tuned", "rounded", "rounded toward the source", "int8"])
def test_weights_that_are_worse_than_recorded_are_found(
    case: str, model: Path, text: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    """What follows from no record is bound by the errors that it leaves."""
    artifact = made(case, model, text, mkaq, tmp_path)

    def better(manifest: Any) -> None:
        step = manifest["steps"][-1]
        if step["step"] == "quantize":
            step["residuals"] = [error * 0.9 for error in step["residuals"]]
        else:
            for layer in step["layers"]:
                layer["error"] *= 0.9

    forge(artifact, better)
    verified = mkaq("verify", artifact, "--source", model)
    assert verified.code == 5 and "leaves an error of" in verified.err
