"""What `verify` finds: damage, another source, and claims that the source does not bear out."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.runs import Mkaq, forge, tree
from tests.tiny import make_model

pytestmark = pytest.mark.usefixtures("one_thread")


def test_verify_tells_what_it_checked(done: Path, model: Path, mkaq: Mkaq) -> None:
    outcome = mkaq("verify", done / "artifact", "--source", model)
    *lines, last = outcome.out.splitlines()
    assert outcome.code == 0 and last == f"verified: {done / 'artifact'}"
    assert len(lines) == 8 and all(line.startswith("ok: ") for line in lines)
    checks = json.loads(mkaq("verify", done / "artifact", "--source", model, "--json").out)
    assert checks == {"verified": True, "checks": [line.removeprefix("ok: ") for line in lines]}


def test_verify_finds_a_flipped_byte_in_every_file(copy: Path, mkaq: Mkaq) -> None:
    artifact = copy / "artifact"
    files = sorted(artifact.iterdir())
    assert len(files) == 8
    for path in files:
        data = path.read_bytes()
        for place in (0, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            outcome = mkaq("verify", artifact)
            assert outcome.code == 5 and path.name in outcome.err, (path, place, outcome.err)
            assert outcome.out == "" and "Traceback" not in outcome.err
        for damaged in (data + b"\n", data[:-1], b""):
            path.write_bytes(damaged)
            outcome = mkaq("verify", artifact)
            assert outcome.code == 5 and path.name in outcome.err, (path, len(damaged), outcome.err)
        path.unlink()
        outcome = mkaq("verify", artifact)
        assert outcome.code == 5 and path.name in outcome.err, outcome.err
        path.write_bytes(data)
    assert mkaq("verify", artifact).code == 0


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model-00001-of-00002.safetensors", "sub/modeling.py"])
def test_verify_finds_an_added_file(copy: Path, mkaq: Mkaq, name: str) -> None:
    (copy / "artifact" / name).parent.mkdir(exist_ok=True)
    (copy / "artifact" / name).write_text("x")
    outcome = mkaq("verify", copy / "artifact")
    assert outcome.code == 5 and f"{name.partition('/')[0]} is not in the manifest" in outcome.err


def test_verify_finds_another_source(done: Path, model: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    outcome = mkaq("verify", done / "artifact", "--source", other)
    assert outcome.code == 5 and "model.safetensors has changed" in outcome.err
    outcome = mkaq(
        "verify", done / "artifact", "--source", make_model(tmp_path / "qwen2", layers=3, family="qwen2")
    )
    assert outcome.code == 5 and "config.json" in outcome.err


FORGERIES: dict[str, Callable[[Any], Any]] = {
    "layers after": lambda m: m["steps"][1].update(layers_after=3),
    "layers between": lambda m: m["steps"][0].update(layers_after=3),
    "bytes after": lambda m: m["steps"][1].update(bytes_after=m["steps"][1]["bytes_after"] - 1),
    "source parameters": lambda m: m["source"].update(parameters=m["source"]["parameters"] + 1),
    "source layers": lambda m: (m["source"].update(layers=4), m["steps"][0].update(layers_before=4)),
    "source file": lambda m: m["source"]["files"][0].update(sha256="0" * 64),
    "no steps": lambda m: m.update(steps=[]),
    "no merge": lambda m: m["steps"].pop(0),
    "no quantization": lambda m: m["steps"].pop(1),
    "coefficient": lambda m: m["steps"][0]["merges"][0].update(coefficient=0.123),
    "weights": lambda m: m["steps"][0]["layers"][1].update({"from": {"1": 0.5, "2": 0.5}}),
    "weights and coefficient": lambda m: (
        m["steps"][0]["layers"][1].update({"from": {"1": 0.5, "2": 0.5}}),
        m["steps"][0]["merges"][0].update(coefficient=0.5),
    ),
    "rescaled": lambda m: m["steps"][0].update(final_norm={"scale": 1.0, "error_before": 0.1, "error": 0.1}),
    "digest of a layer": lambda m: m["steps"][0]["layers"][0].update(sha256="0" * 64),
    "one layer less": lambda m: m["steps"][0]["layers"].pop(),
    "number of a layer": lambda m: m["steps"][0]["layers"][0].update(new=5),
    "type of the merge": lambda m: m["steps"][0].update(dtype="float32"),
    "weight error": lambda m: m["steps"][1]["modules"][0].update(weight_error=0.001),
    "solved where nothing is": lambda m: m["steps"][1]["modules"][0].update(ridge=1.0),
    "a module less": lambda m: m["steps"][1]["modules"].pop(),
    "bits": lambda m: m["steps"][1].update(bits=8),
    "method": lambda m: m["steps"][1].update(method="bitsandbytes"),
    "file outside": lambda m: m["files"][0].update(path="../recipe.yaml"),
    # a hostile manifest is not trusted with names or numbers
    "no type": lambda m: m["steps"][0].update(dtype="load"),
    "layer x": lambda m: m["steps"][0]["layers"][0].update({"from": {"x": 1.0}}),
    "layer 99": lambda m: m["steps"][0]["layers"][0].update({"from": {"99": 1.0}}),
    "no layer": lambda m: m["steps"][0]["layers"][0].update({"from": {}}),
    "merge of 99": lambda m: m["steps"][0]["merges"][0].update(into=99),
    "not a number": lambda m: m["evaluation"].update(source={"perplexity": float("nan")}),
    "half a character": lambda m: m.update(name="\ud800"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_verify_against_the_source_finds_a_forged_claim(
    forgery: str, copy: Path, model: Path, mkaq: Mkaq
) -> None:
    forge(copy / "artifact", FORGERIES[forgery])
    outcome = mkaq("verify", copy / "artifact", "--source", model)
    assert outcome.code == 5 and outcome.out == "", outcome.err
    assert "Traceback" not in outcome.err


def test_forging_nothing_is_no_forgery(copy: Path, model: Path, mkaq: Mkaq) -> None:
    before = tree(copy / "artifact")
    forge(copy / "artifact", lambda manifest: None)
    assert tree(copy / "artifact") == before
    assert mkaq("verify", copy / "artifact", "--source", model).code == 0


def test_verify_finds_weights_swapped_under_a_fitting_manifest(copy: Path, model: Path, mkaq: Mkaq) -> None:
    """Someone who changes weights and signs anew: the files agree, the source does not."""
    artifact = copy / "artifact"
    tensors = load_file(artifact / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.qweight"][0, 0] += 1
    save_file(tensors, artifact / "model.safetensors", metadata={"format": "pt"})

    def sign(manifest: Any) -> None:
        data = (artifact / "model.safetensors").read_bytes()
        for entry in manifest["files"]:
            if entry["path"] == "model.safetensors":
                entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    forge(artifact, sign)
    assert mkaq("verify", artifact).code == 0
    outcome = mkaq("verify", artifact, "--source", model)
    assert outcome.code == 5 and "model.layers.0.mlp.up_proj" in outcome.err
