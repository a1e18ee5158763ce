"""Which runtimes run an artifact: what is claimed, what is printed, what is in the JSON."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.runtimes_table import END, START, table
from mkaq.formats.compressed_tensors import quantization_config
from mkaq.formats.runtimes import describe, runtimes
from mkaq.stages.quantize import BitsandbytesSection, GptqSection
from tests.runs import Mkaq

pytestmark = pytest.mark.usefixtures("one_thread")
HERE, VLLM, VLLM_CPU = "transformers on a CPU", "vLLM", "vLLM on a CPU"
ONNX = "ONNX Runtime GenAI"
ROOT = Path(__file__).parent.parent
TRIALS = json.loads((ROOT / "benchmarks/results/runtimes.json").read_text())["rows"]
TRIED = {  # the names of environments
    "transformers with GPTQModel": HERE,
    "transformers with compressed-tensors": HERE,
    "MLX on a CPU": "MLX",
    "vLLM on a CPU": VLLM_CPU,
    "ONNX Runtime GenAI": ONNX,
    "llama.cpp": "llama.cpp",
}
EVERY = {HERE, VLLM, VLLM_CPU, ONNX}


def gptq(**options: Any) -> dict[str, Any]:
    """The configuration of what a recipe's section makes."""
    return GptqSection(method="gptq", **options).config(torch.bfloat16)


def running(config: dict[str, Any] | None) -> set[str]:
    found = runtimes(config)
    assert all(row.runs == (row.reason == "") for row in found)
    return {row.runtime for row in found if row.runs}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"bits": 4}, EVERY),
        ({"bits": 4, "group_size": 256}, {HERE, ONNX}),
        ({"bits": 4, "group_size": -1}, {VLLM, VLLM_CPU}),
        ({"bits": 8, "group_size": -1}, {HERE, VLLM}),
        ({"bits": 4, "group_size": 16}, {ONNX}),
        ({"bits": 8}, EVERY - {VLLM_CPU}),
        ({"bits": 8, "group_size": 16}, {HERE, ONNX}),
        ({"bits": 3}, {HERE}),
        ({"bits": 2}, {HERE, ONNX}),
        ({"bits": 2, "group_size": -1}, {HERE}),
        ({"bits": 4, "sym": False}, {HERE, ONNX}),
        ({"bits": 4, "sym": False, "desc_act": True}, {HERE}),
        ({"bits": 4, "desc_act": True}, {HERE, ONNX}),
        ({"bits": 8, "desc_act": True}, {HERE}),
        ({"bits": 4, "desc_act": True, "static_groups": True}, EVERY),
        ({"bits": 4, "lm_head": True}, EVERY - {HERE}),
    ],
)
def test_gptq(options: dict[str, Any], expected: set[str]) -> None:
    assert running(gptq(**options)) == expected


@pytest.mark.parametrize("trial", TRIALS, ids=lambda t: " ".join(str(v) for v in list(t.values())[:6]))
def test_the_answer_is_what_was_seen(trial: dict[str, Any]) -> None:
    runtime, kind = TRIED[trial["runtime"]], trial["format"]
    keys = ("bits", "sym", "group_size", "desc_act", "lm_head")
    options = {key: trial[key] for key in keys if key in trial}
    if kind == "compressed-tensors":
        ignore = [] if options.pop("lm_head", False) else ["lm_head"]
        config: dict[str, Any] | None = quantization_config(**options, ignore=ignore)
    else:
        config = None if kind == "dense" else gptq(**options)
    answers = {
        row.runtime: row.runs for row in runtimes(config, formats=[kind] if kind in ("mlx", "gguf") else [])
    }
    assert answers[runtime] == (trial["loads"] and trial["agrees"])


def test_readme_has_the_table() -> None:
    """`python -m benchmarks.runtimes_table` writes it."""
    assert f"{START}{table()}{END}" in (ROOT / "README.md").read_text()


def test_bitsandbytes_runs_in_transformers_and_what_is_only_merged_nearly_everywhere() -> None:
    for bits in (4, 8):
        section = BitsandbytesSection(method="bitsandbytes", bits=bits)
        assert running(section.config(torch.bfloat16)) == {HERE}
    assert running(None) == EVERY | {"MLX", "OpenVINO"}


@pytest.mark.parametrize("sym", [True, False])
def test_compressed_tensors(sym: bool) -> None:
    for bits, expected in [(4, {HERE, VLLM_CPU}), (8, {HERE}), (3, {HERE}), (2, {HERE})]:
        config = quantization_config(bits=bits, group_size=128, sym=sym, ignore=["lm_head"])
        assert running(config) == expected
    assert "is not known" in next(row.reason for row in runtimes(config) if row.runtime == VLLM)
    odd = quantization_config(bits=4, group_size=16, sym=sym, ignore=["lm_head"])
    assert running(odd) == {HERE}


def test_lines_name_the_setting_and_what_would_do() -> None:
    lines = list(describe(runtimes(gptq(bits=3))))
    assert lines[:2] == [
        "runs in: transformers on a CPU",
        "vLLM: no, because 3 bits are not among its GPTQ kernels (4, 8)",
    ]
    nowhere = gptq(bits=4, sym=False, group_size=16, desc_act=True)
    assert next(describe(runtimes(nowhere))) == "runs in: none that is known"


def test_several_choices_run_where_each_of_them_does() -> None:
    lines = list(describe(runtimes(*(gptq(bits=bits) for bits in (8, 4, 3)))))
    assert lines[0] == "runs in: transformers on a CPU"
    assert "vLLM on a CPU: no, because 8 bits are not among its GPTQ kernels (4)" in lines
    assert sum("GGUF" in line for line in lines) == 1


def test_plan_and_run_say_it(recipe: Callable[..., Path], mkaq: Mkaq, tmp_path: Path) -> None:
    path = recipe(merge=None, quantize={"method": "gptq", "bits": 3, "group_size": 32})
    line = "vLLM on a CPU: no, because 3 bits are not among its GPTQ kernels (4)\n"
    folder = tmp_path / "run"
    assert line in mkaq("plan", path).out
    assert line in mkaq("run", path, "--output", folder).out
    assert "runs in" not in mkaq("run", path, "--output", folder, "--until", "quantize").out
    for command in (("plan",), ("run", "--output", folder)):
        rows = json.loads(mkaq(*command, path, "--json").out)["runtimes"]
        assert {row["runtime"] for row in rows if row["runs"]} == {HERE}
        assert all(row["reason"] for row in rows if not row["runs"])
    assert (
        json.loads(mkaq("run", path, "--output", folder, "--until", "quantize", "--json").out)["runtimes"]
        == []
    )
