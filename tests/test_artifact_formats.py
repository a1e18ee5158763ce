"""An artifact in every format, through the command line: what is written, refused, and found by verify."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mkaq.manifest import read_manifest
from tests.runs import Mkaq, forge, one_message, run_quietly, tree
from tests.tiny import write_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
EVERY = ["safetensors", "gguf", "compressed-tensors", "mlx"]
GGUF = "gguf/run.gguf"


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory, model: Path, text: Path) -> Path:
    """A recipe that asks for all formats."""
    recipe = tmp_path_factory.mktemp("formats") / "recipe.yaml"
    export = {"formats": EVERY, "gguf": {"embedding": "q8_0"}}
    return write_recipe(recipe, model, text, name="run", export=export, evaluate=None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, formats: Path) -> Path:
    """Its artifact. Not to be changed."""
    return run_quietly(formats, tmp_path_factory.mktemp("made") / "run") / "artifact"


def test_every_format_is_in_the_artifact_the_manifest_and_the_card(made: Path) -> None:
    manifest, files = read_manifest(made), tree(made)
    assert {name.partition("/")[0] for name in files if "/" in name} == set(EVERY[1:])
    assert GGUF in files and "mlx/model.safetensors" in files
    assert [each.format for each in manifest.exports] == EVERY[1:]
    for each in manifest.exports:
        sizes = [len(data) for name, data in files.items() if name.startswith(f"{each.format}/")]
        assert each.bytes == sum(sizes) > 0
        assert f"`{each.format}/" in (made / "README.md").read_text()


def test_the_form_of_mlx_is_refused_by_name(made: Path, mkaq: Mkaq) -> None:
    one_message(mkaq("eval", made / "mlx"), 3, "in the form of MLX", "the artifact's own folder")


def test_inspect_names_every_format(made: Path, mkaq: Mkaq) -> None:
    shown = mkaq("inspect", made).out
    assert all(f"{name}: the same codes and weights in " in shown for name in EVERY[1:])


def test_the_same_recipe_gives_the_same_bytes(made: Path, formats: Path, tmp_path: Path) -> None:
    assert tree(run_quietly(formats, tmp_path / "again") / "artifact") == tree(made)


def test_verify_compares_the_formats(made: Path, model: Path, mkaq: Mkaq) -> None:
    verified = mkaq("verify", made, "--source", model)
    assert verified.code == 0, verified.err
    for name in EVERY[1:]:
        assert f"ok: {name} holds the same codes and weights, bit for bit" in verified.out


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)


def resigned(artifact: Path) -> None:
    """The manifest of whoever changes a file and signs anew."""

    def sign(manifest: Any) -> None:
        for entry in manifest["files"]:
            data = (artifact / entry["path"]).read_bytes()
            entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    forge(artifact, sign)


@pytest.mark.parametrize("file", [GGUF, "compressed-tensors/model.safetensors", "mlx/model.safetensors"])
def test_a_changed_format_is_found_even_under_a_fitting_manifest(
    made: Path, file: str, mkaq: Mkaq, tmp_path: Path
) -> None:
    artifact = shutil.copytree(made, tmp_path / "artifact")
    flipped(artifact / file)
    one_message(mkaq("verify", artifact), 5, f"{file} has changed")
    resigned(artifact)
    one_message(mkaq("verify", artifact), 5, file.partition("/")[0])


FORGERIES: dict[str, Callable[[Any], Any]] = {
    "another size": lambda m: m["exports"][0].update(bytes=1),
    "a format less": lambda m: m["exports"].pop(),
    "another name": lambda m: m.update(name="other"),
    "other types": lambda m: m["recipe"]["export"].update(gguf={"embedding": "f32", "dense": "source"}),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_claim_about_a_format_is_found(made: Path, forgery: str, mkaq: Mkaq, tmp_path: Path) -> None:
    artifact = shutil.copytree(made, tmp_path / "artifact")
    forge(artifact, FORGERIES[forgery])
    outcome = mkaq("verify", artifact)
    assert outcome.code == 5 and outcome.out == "", outcome.err


REFUSED = {
    "desc_act": (["quantize.desc_act=true"], "gguf cannot hold this model"),
    "not quantized": (["quantize=null"], "compressed-tensors cannot hold this model"),
    "bitsandbytes": (
        ["quantize={method: bitsandbytes}"],
        "fix: leave gguf and compressed-tensors and mlx out, or change quantize",
    ),
    "group": (["quantize.group_size=16"], "multiple of 32"),
    "a target": (
        ["export={formats: [safetensors]}", "targets=[llama.cpp]"],
        "leave llama.cpp out of targets",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("command", ["plan", "run"])
def test_what_a_format_cannot_hold_is_refused_before_any_work(
    command: str, name: str, formats: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    settings, words = REFUSED[name]
    changes = [part for setting in settings for part in ("--set", setting)]
    outcome = mkaq(command, formats, *changes, "--output", tmp_path / "run")
    one_message(outcome, 3, words)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_llama_cpp_lacks_is_refused_before_any_work(
    formats: Path, model: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    changed = shutil.copytree(model, tmp_path / "model")
    tokenizer = json.loads((changed / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (changed / "tokenizer.json").write_text(json.dumps(tokenizer))
    outcome = mkaq("plan", formats, "--set", f"model.path={changed}", "--output", tmp_path / "run")
    one_message(outcome, 3, "gguf cannot hold this model", "Lowercase")


def test_the_formats_decide_which_runtimes_run_it(formats: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    def running(*settings: str) -> set[str]:
        changes = [part for setting in settings for part in ("--set", setting)]
        outcome = mkaq("plan", formats, *changes, "--output", tmp_path / "run", "--json")
        assert outcome.code == 0, outcome.err
        return {row["runtime"] for row in json.loads(outcome.out)["runtimes"] if row["runs"]}

    alone = running("export={formats: [safetensors]}")
    assert "llama.cpp" not in alone and "MLX" not in alone
    assert running() == alone | {"llama.cpp", "MLX"}
    assert running("targets=[llama.cpp, mlx, transformers]") == alone | {"llama.cpp", "MLX"}
