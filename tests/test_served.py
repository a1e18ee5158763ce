"""vLLM and ONNX Runtime GenAI write what an artifact means, each in an environment of its own."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.runtimes import WORKERS, answers, inputs, make, row_of, truth_of
from mkaq.checkpoint.resolve import resolve_model
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.export.formats import EXPORTS
from mkaq.export.settings import Settings
from tests.runs import python_of

FORMATS = "gptq", "compressed-tensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The built-in model with 4 bits, in each format."""
    folder = tmp_path_factory.mktemp("served")
    make({"bits": 4, "group_size": 128}, "builtin:tiny-llama", folder / "run")
    found = {"gptq": folder / "run" / "artifact", "compressed-tensors": folder / "compressed-tensors"}
    found["compressed-tensors"].mkdir()
    model = open_checkpoint(found["gptq"], quantized=True)
    EXPORTS["compressed-tensors"].write(model, found["compressed-tensors"], Settings("served"))
    return found


@pytest.mark.parametrize("runtime", ["vllm", "onnx"])
def test_the_same_text(runtime: str, request: pytest.FixtureRequest) -> None:
    if not (python := python_of(runtime)).exists():
        pytest.skip(f"no {runtime} at {python} (make .venv-{runtime}/ready makes it)")
    folders: dict[str, Path] = request.getfixturevalue("folders")
    ids, prompts = inputs(resolve_model("builtin:tiny-llama"))
    truth, worker = truth_of(folders["gptq"], ids, prompts), WORKERS[runtime]
    asked = {str(folders[name]): name for name in FORMATS if name in worker.formats}
    told = answers(str(python), worker.script, list(asked), ids, prompts, worker.exact or "auto")
    rows: dict[str, Any] = {asked[at]: row_of({}, runtime, answer, truth) for at, answer in told}
    assert sorted(rows) == sorted(asked.values())
    for name, row in rows.items():
        assert row["loads"] and row["agrees"], (name, row)
        assert row["difference"] < 0.005 and max(row["gaps"]) < 0.01, (name, row)
