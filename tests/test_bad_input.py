"""Bad input and bad luck: one clear message, its exit code, and everything made before as it was."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mkaq.errors import MkaqError
from mkaq.handoff import digest_of, locked
from mkaq.model.checkpoint import open_checkpoint
from tests.conftest import Outcome
from tests.test_cli import (
    PROTECT,
    STAGES,
    command,
    forge,
    one_thread,  # noqa: F401 (a fixture)
    run_quietly,
    told,
    tree,
    write_recipe,
    write_text,
)
from tests.tiny import edit_config, make_model

Mkaq = Callable[..., Outcome]
Damage = Callable[[Path], object]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
UP = "model.layers.1.mlp.up_proj.weight"
EMBED = "model.embed_tokens.weight"
CHANNELS = {"layers": 1, "fuse": "channels", "order": "measured", "protect": {"first": 1, "last": 0}}
FREE = {key: value for key, value in CHANNELS.items() if key != "layers"}
LOGS = ("recipe.yaml", "run.json", ".lock")  # of the last run, whatever became of it


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "topics.txt")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good model. Not to be changed: copy it first."""
    return make_model(tmp_path_factory.mktemp("small") / "model", layers=3)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory, model: Path, text: Path) -> Path:
    """A folder with a finished run of another recipe. Not to be changed: copy it first."""
    folder = tmp_path_factory.mktemp("earlier")
    merge = {"layers": 1, **PROTECT, "coefficient": 0.3}
    quantize = {"method": "gptq", "bits": 8, "group_size": 64}
    recipe = write_recipe(folder / "recipe.yaml", model, text, name="earlier", merge=merge, quantize=quantize)
    recipe.write_text(recipe.read_text().replace("num_samples: 8", "num_samples: 9"))
    return run_quietly(recipe, folder / "run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path, text: Path) -> Path:
    """A run of the recipe of `recipe` that nothing disturbed. Not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    return run_quietly(write_recipe(folder / "recipe.yaml", model, text), folder / "run")


@pytest.fixture
def recipe(tmp_path: Path, model: Path, text: Path) -> Callable[..., Path]:
    """Writes a recipe; keyword arguments replace whole sections."""
    return lambda **sections: write_recipe(tmp_path / "recipe.yaml", model, text, **sections)


@pytest.fixture
def folder(earlier: Path, tmp_path: Path) -> Path:
    """A copy of the earlier run's folder, to run in."""
    return shutil.copytree(earlier, tmp_path / "run")


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Callable[[Damage], Path]:
    """A damaged copy of the model."""

    def make(damage: Damage) -> Path:
        copy = shutil.copytree(model, tmp_path / "model")
        damage(copy)
        return copy

    return make


@pytest.fixture
def refused(mkaq: Mkaq, recipe: Callable[..., Path], earlier: Path) -> Callable[..., Outcome]:
    """Runs a recipe that must be refused before anything is written, in a folder with an earlier run."""

    def check(code: int, *words: str, arguments: tuple[object, ...] = (), **sections: Any) -> Outcome:
        path = sections.pop("path", None) or recipe(**sections)
        before = tree(earlier)
        outcome = mkaq("run", path, "--output", earlier, *arguments)
        one_message(outcome, code, *words)
        assert outcome.err.startswith("mkaq: ")
        assert tree(earlier) == before
        return outcome

    return check


def one_message(outcome: Outcome, code: int, *words: str) -> None:
    """One message on stderr, with the words that it must hold, nothing on stdout, and the exit code."""
    assert outcome.code == code, outcome.err
    assert outcome.out == "" and outcome.err.count("mkaq: ") == 1
    assert "Traceback" not in outcome.err and "fault of mkaq" not in outcome.err
    for word in words:
        assert word in outcome.err, (word, outcome.err)


def kept(folder: Path) -> dict[str, bytes]:
    """Every file of a run's folder but its logs."""
    return {name: data for name, data in tree(folder).items() if name not in LOGS}


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


# --- recipes -----------------------------------------------------------------------------------

HEAD = "version: 1\nname: x\nmodel: {path: m}\n"
MEASURED = "evaluate: {perplexity: {dataset: builtin}}\n"
RECIPES: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "three faults": (
        "version: 1\nname: a b\nmodel: {path: m}\nmerge: {ration: 0.2, layers: 1}\n"
        "quantize:\n  method: gptq\n  bits: 5\n",
        2,
        (
            "3 faults",
            "line 2, name: 'a b' may hold letters",
            "line 4, merge.ration: unknown key (did you mean 'ratio'?)",
            "line 7, quantize.bits: must be 2, 3, 4 or 8, not 5",
        ),
    ),
    "duplicate keys": (
        "version: 1\nname: x\nname: y\nmodel:\n  path: m\n  path: n\n",
        2,
        ("line 3, name: given twice", "line 6, model.path: given twice"),
    ),
    "near miss": (
        HEAD + "quantise: null\n",
        2,
        ("line 4, quantise: unknown key (did you mean 'quantize'?)",),
    ),
    "near miss of a value": (
        HEAD + "merge: {layers: 1, order: similarty}\n",
        2,
        ("did you mean 'similarity'?",),
    ),
    "no near miss": (
        HEAD + "merge: {layers: 1, zzz: 1}\n",
        2,
        ("merge.zzz: unknown key (known here:", "ratio"),
    ),
    "empty": ("", 2, ("is not a mapping",)),
    "list": ("- version: 1\n", 2, ("is not a mapping",)),
    "no YAML": ("version: [1\n", 2, ("is not YAML",)),
    "tag": ("version: 1\nname: !!python/object/apply:os.system [id]\n", 2, ("is not YAML", "os.system")),
    "no model": ("version: 1\nname: x\n", 2, ("model: is required",)),
    "nothing to do": (HEAD.replace("{path: m}", "{path: 'builtin:tiny-llama'}"), 2, ("nothing to do",)),
    "path as name": (HEAD.replace("name: x", "name: ../x"), 2, ("line 2, name: '../x' may hold letters",)),
    "both targets": (HEAD + "merge: {layers: 1, ratio: 0.5}\n", 2, ("give either ratio or layers",)),
    "text without path": (
        HEAD + "calibration: {dataset: mmlu}\n",
        2,
        ("line 4", "dataset mmlu needs a path"),
    ),
    "no size": (HEAD + "export: {shard_size: 4 parsecs}\n", 2, ("'4 parsecs' is not a size",)),
    "size without end": (HEAD + f"export: {{shard_size: {'9' * 400}GB}}\n", 2, ("export.shard_size",)),
    "date": (HEAD + "merge: {ratio: 2001-99-99}\n", 2, ("is not YAML",)),
    "long number": (HEAD + f"merge: {{layers: {'1' * 5000}}}\n", 2, ("is not YAML",)),
    "no number": (HEAD + "merge: {ratio: .nan}\n", 2, ("merge.ratio",)),
    "infinity": (
        HEAD + "merge: {layers: 1, manifold: {bandwidth: .inf}}\n",
        2,
        ("merge.manifold.bandwidth",),
    ),
    "number as key": (HEAD + "merge: {layers: 1, 2: 3}\n", 2, ("line 4", "merge")),
    "list as key": (HEAD + "merge: {[1, 2]: 3}\n", 2, ("recipe.yaml",)),
    "number as first key": (HEAD + "5: 6\n", 2, ("is not a mapping",)),
    "own ancestor": (HEAD + "merge: &a {layers: *a}\n", 2, ("recipe.yaml",)),
    "unknown method": (HEAD + "quantize: {method: awq}\n", 2, ("line 4, quantize", "gptq", "not 'awq'")),
    "no method": (HEAD + "quantize: {bits: 4}\n", 2, ("method is required",)),
    "gguf": (HEAD + "export: {formats: [safetensors, gguf]}\n", 3, ("line 4, export.formats: gguf",)),
    "later option and fault": (
        HEAD + "export: {formats: [gguf]}\nzzz: 1\n",
        2,
        ("line 4, export.formats: gguf not in this version", "line 5, zzz: unknown key"),
    ),
    "unknown order": (HEAD + "merge: {layers: 1, order: measure}\n", 2, ("did you mean 'measured'?",)),
    "unknown fuse": (HEAD + "merge: {layers: 1, fuse: channel}\n", 2, ("did you mean 'channels'?",)),
    "unknown target": (HEAD + "quantize: {method: gptq, target: sauce}\n", 2, ("did you mean 'source'?",)),
    "recovery of nothing": (
        HEAD + "recover: {method: layerwise}\n",
        2,
        ("recover mends what merge did; with merge: null there is nothing to recover",),
    ),
    "recovery without method": (
        HEAD + "merge: {layers: 1}\nrecover: {steps: 5}\n",
        2,
        ("line 5, recover.method: is required",),
    ),
    "no learning rate": (
        HEAD + "merge: {layers: 1}\nrecover: {method: layerwise, learning_rate: fast}\n",
        2,
        ("line 5, recover.learning_rate: must be 'auto', not 'fast'",),
    ),
    "huge learning rate": (
        HEAD + "merge: {layers: 1}\nrecover: {method: layerwise, learning_rate: 1.5}\n",
        2,
        ("line 5, recover.learning_rate:", "less than 1, not 1.5"),
    ),
    "no steps": (
        HEAD + "merge: {layers: 1}\nrecover: {method: layerwise, steps: 0}\n",
        2,
        ("line 5, recover.steps:", "not 0"),
    ),
    "merge without a target": (
        HEAD + "merge: {order: measured}\n",
        2,
        ("merge needs ratio or layers, or the recipe a budget",),
    ),
    "budget of both": (
        HEAD + MEASURED + "budget: {bytes: 4GB, perplexity_increase: 5%}\n",
        2,
        ("line 5, budget: give either bytes or perplexity_increase",),
    ),
    "budget of neither": (
        HEAD + MEASURED + "budget: {bits: [4]}\n",
        2,
        ("line 5, budget: give either bytes or perplexity_increase",),
    ),
    "budget and ratio": (
        HEAD + MEASURED + "merge: {ratio: 0.2}\nbudget: {bytes: 4GB}\n",
        2,
        ("the budget says how much is merged: leave out merge.ratio and merge.layers",),
    ),
    "budget and layers": (
        HEAD + MEASURED + "merge: {layers: 2}\nbudget: {perplexity_increase: 5%}\n",
        2,
        ("the budget says how much is merged",),
    ),
    "budget without measuring": (
        HEAD + "merge: {order: measured}\nbudget: {bytes: 4GB}\n",
        2,
        ("a budget is met by measuring: it needs evaluate.perplexity",),
    ),
    "budget of no size": (
        HEAD + MEASURED + "budget: {bytes: 4 parsecs}\n",
        2,
        ("line 5, budget.bytes: '4 parsecs' is not a size such as 500MB or 4GB",),
    ),
    "budget of no share": (
        HEAD + MEASURED + "budget: {perplexity_increase: five}\n",
        2,
        ("line 5, budget.perplexity_increase: 'five'",),
    ),
    "budget of five bits": (HEAD + MEASURED + "budget: {bytes: 4GB, bits: [5]}\n", 2, ("line 5", "not 5")),
    "budget of no bits": (HEAD + MEASURED + "budget: {bytes: 4GB, bits: []}\n", 2, ("line 5, budget.bits",)),
    "budget of nothing to do": (
        HEAD.replace("{path: m}", "{path: 'builtin:tiny-llama'}") + MEASURED + "budget: {bytes: 4GB}\n",
        2,
        ("nothing to do",),
    ),
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipe_with_faults(case: str, tmp_path: Path, refused: Callable[..., Outcome]) -> None:
    content, code, words = RECIPES[case]
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    outcome = refused(code, *words, path=path)
    assert str(path) in outcome.err or "nothing to do" in case


def test_recipe_that_is_no_text(tmp_path: Path, refused: Callable[..., Outcome]) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    refused(2, "recipe.yaml: cannot be read", path=tmp_path / "recipe.yaml")
    refused(2, f"{tmp_path}: cannot be read", path=tmp_path)


def test_recipe_that_grows_when_read(tmp_path: Path, refused: Callable[..., Outcome]) -> None:
    """Twenty lines of aliases that stand for a million values ("billion laughs")."""
    lines = ["  l0: &l0 [a, a]"] + [f"  l{i}: &l{i} [*l{i - 1}, *l{i - 1}]" for i in range(1, 17)]
    (tmp_path / "recipe.yaml").write_text(HEAD + "merge:\n" + "\n".join(lines) + "\n")
    began = time.perf_counter()
    refused(2, "recipe.yaml", path=tmp_path / "recipe.yaml")
    assert time.perf_counter() - began < 0.5


@pytest.mark.parametrize(
    "name", ["nowhere.yaml", "nowhere/at/all.yaml", "llama3_8b_int5", "~nosuchuser/x.yaml"]
)
def test_missing_recipe(name: str, refused: Callable[..., Outcome]) -> None:
    refused(2, f"{name}: no such ", path=name)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("merge", ("'merge' is not KEY=VALUE", "for example")),
        ("=1", ("is not KEY=VALUE",)),
        ("merge..layers=1", ("is not KEY=VALUE",)),
        ("merge.layers.x=1", ("--set merge.layers.x", "layers holds a value")),
        ("merge.ration=0.5", ("--set merge.ration", "did you mean 'ratio'?")),
        ("quantize.bits=5", ("--set quantize.bits", "must be 2, 3, 4 or 8, not 5")),
        ("quantize.bits=[", ("--set quantize.bits",)),
        ("merge.layers=99", ("merge", "99 of 3 layers")),
        ("merge.coefficient=2001-99-99", ("--set merge.coefficient",)),
        (f"merge.layers={'1' * 5000}", ("--set merge.layers",)),
        ("model.path=!!python/object/apply:os.system [id]", ("os.system",)),
    ],
)
def test_setting_with_a_fault(setting: str, words: tuple[str, ...], refused: Callable[..., Outcome]) -> None:
    refused(2, *words, arguments=("--set", setting))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("frobnicate",), ("frobnicate",)),
        (("run",), ("RECIPE",)),
        (("run", "x.yaml", "--until", "nothing"), ("--until", "nothing")),
        (("run", "x.yaml", "--frobnicate"), ("--frobnicate",)),
        (("run", "x.yaml", "y.yaml"), ("y.yaml",)),
        (("run", "tiny_llama_int4", "--device", "tpu"), ("--device", "tpu")),
        (("run", "tiny_llama_int4", "--device", "cuda:99"), ("--device", "cuda:99")),
        (("generate", "builtin:tiny-llama", ""), ("PROMPT",)),
        (("generate", "builtin:tiny-llama", "\udcff"), ("PROMPT",)),
        (("generate", "builtin:nothing", "x"), ("builtin:nothing", "builtin:tiny-llama")),
        (("analyze", "builtin:tiny-llama", "--num-samples", "0"), ("--num-samples",)),
        (("eval", "builtin:tiny-llama", "--dataset", "text"), ("--dataset", "needs a path")),
        (("eval", "builtin:tiny-llama", "--max-seq-length", "x"), ("--max-seq-length", "x")),
    ],
)
def test_wrong_command_line(
    arguments: tuple[str, ...],
    words: tuple[str, ...],
    mkaq: Mkaq,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    one_message(mkaq(*arguments), 2, *words)
    assert list(tmp_path.iterdir()) == []


def test_no_command_shows_the_help(mkaq: Mkaq) -> None:
    outcome = mkaq()
    assert outcome.code in (0, 2) and "Usage" in outcome.out + outcome.err
    assert "fault of mkaq" not in outcome.err


def test_traceback_only_with_debug(mkaq: Mkaq, tmp_path: Path) -> None:
    one_message(mkaq("run", tmp_path / "nowhere.yaml"), 2)
    outcome = mkaq("--debug", "run", tmp_path / "nowhere.yaml")
    assert outcome.code == 2 and "Traceback (most recent call last)" in outcome.err
    assert outcome.err.splitlines()[-2].startswith("mkaq: ")


def test_fault_of_mkaq_itself_is_one_message(
    mkaq: Mkaq, recipe: Callable[..., Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr("mkaq.stages.calibration_tokens", fail)
    outcome = mkaq("run", recipe(), "--output", folder)
    assert outcome.code == 1 and "fault of mkaq itself: RuntimeError: unforeseen" in outcome.err
    assert "Traceback" not in outcome.err and "report" in outcome.err
    assert "in fail" in mkaq("--debug", "run", recipe(), "--output", folder).err


# --- models ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["nowhere/at/all", "/nowhere", "builtin:nothing", "~nosuchuser/model", "a\0b"]
)
def test_missing_model(path: str, refused: Callable[..., Outcome]) -> None:
    refused(2, path if "\0" not in path else "model", model={"path": path})


def test_missing_model_of_the_hub(refused: Callable[..., Outcome]) -> None:
    refused(2, "nobody/nothing", "the hub", "check the name", model={"path": "nobody/nothing"})


def test_file_instead_of_a_model(model: Path, refused: Callable[..., Outcome]) -> None:
    refused(2, "is a file", model={"path": str(model / SINGLE)})


CHECKPOINTS: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "one shard missing": (lose_shard, ("1 of 2 weight files missing", SHARDS[1], "fix: download")),
    "wrong shape": (change_up(lambda w: w.T), (UP, "[64, 128]", "[128, 64]", SINGLE)),
    "one dimension": (change_up(lambda w: w.flatten()), (UP, "[8192]")),
    "only pickle": (only_pickle, ("pytorch_model.bin", "pickle can run code", "fix: ")),
    "no weights": (lambda f: (f / SINGLE).unlink(), ("no weights",)),
    "no config": (lambda f: (f / "config.json").unlink(), ("config.json: is missing",)),
    "missing tensor": (change_tensors(lambda t: t.pop(UP)), ("1 tensors missing", UP)),
    "extra tensor": (change_tensors(lambda t: t.update(evil=torch.zeros(2))), ("does not imply", "evil")),
    "layer missing": (
        change_tensors(lambda t: [t.pop(name) for name in list(t) if ".layers.1." in name]),
        ("9 tensors missing", "model.layers.1."),
    ),
    "layer too many": (
        change_tensors(lambda t: t.update({UP.replace("1", "3"): t[UP].clone()})),
        ("says 3 layers, the weights have 4",),
    ),
    "layer 10^14": (
        change_tensors(lambda t: t.update({UP.replace("1", str(10**14)): torch.zeros(2)})),
        ("says 3 layers, the weights have",),
    ),
    # files
    "empty": (change_bytes(lambda data: b""), (SINGLE, "not a whole safetensors file")),
    "cut in its length": (change_bytes(lambda data: data[:7]), (SINGLE, "cut short")),
    "cut in its header": (change_bytes(lambda data: data[:100]), (SINGLE, "not a whole safetensors file")),
    "cut in half": (change_bytes(lambda data: data[: len(data) // 2]), (SINGLE, "not a whole")),
    "cut by a byte": (change_bytes(lambda data: data[:-1]), (SINGLE, "not a whole")),
    "a byte too long": (change_bytes(lambda data: data + b"\0"), (SINGLE, "not a whole")),
    "pickle by another name": (change_bytes(lambda data: b"\x80\x04}q\0." * 9), (SINGLE, "not a whole")),
    "length of header": (change_bytes(lambda d: (2**63).to_bytes(8, "little") + d[8:]), (SINGLE, "not a")),
    "type in header": (change_header(lambda h: h[UP].update(dtype="F32")), (SINGLE, "not a whole")),
    "unknown type": (change_header(lambda h: h[UP].update(dtype="X9")), (SINGLE, "X9")),
    "shape in header": (change_header(lambda h: h[UP].update(shape=[64, 128])), (UP, "[64, 128]")),
    "huge shape": (change_header(lambda h: h[UP].update(shape=[2**62, 2**62])), (SINGLE, "not a whole")),
    "negative shape": (change_header(lambda h: h[UP].update(shape=[-1, -8192])), (SINGLE, "not a whole")),
    "offsets outside": (change_header(lambda h: h[UP].update(data_offsets=[0, 10**12])), (SINGLE, UP)),
    "offsets of another": (
        change_header(lambda h: h[UP].update(data_offsets=h[UP.replace("1", "0")]["data_offsets"])),
        (SINGLE, "not a whole"),
    ),
    # the index
    "index leaves the folder": (lambda f: shard(f, **{UP: "../x.safetensors"}), (INDEX, UP, "'../x.")),
    "index is absolute": (lambda f: shard(f, **{UP: "/tmp/x.safetensors"}), (INDEX, UP, "'/tmp/x.")),
    "index goes below": (lambda f: shard(f, **{UP: "sub/x.safetensors"}), (INDEX, UP, "'sub/x.")),
    "index names a pickle": (lambda f: shard(f, **{UP: "x.bin"}), (INDEX, UP, "'x.bin'")),
    "index names a number": (lambda f: shard(f, **{UP: 5}), (INDEX, UP)),
    "index with a null": (lambda f: shard(f, **{UP: f"{SHARDS[0]}\0"}), (INDEX, UP)),
    "index with a long name": (lambda f: shard(f, **{UP: f"{'x' * 5000}.safetensors"}), ("xxx",)),
    "index with a tensor more": (lambda f: shard(f, evil=SHARDS[0]), (INDEX, "evil is not in")),
    "index with the wrong shard": (swap_shards, (INDEX, f"tensor {EMBED} is in ")),
    "index is no JSON": (lambda f: (f / INDEX).write_text("{"), (INDEX, "not readable JSON")),
    "index is a list": (lambda f: (f / INDEX).write_text("[]"), (INDEX, "not a JSON object")),
    "index is empty": (lambda f: (f / INDEX).write_text("{}"), (INDEX, "no weight_map")),
    # config.json
    "config is no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        ("config.json", "not readable JSON"),
    ),
    "config is no text": (
        lambda f: (f / "config.json").write_bytes(b"\xff"),
        ("config.json", "not readable"),
    ),
    "config is a list": (
        lambda f: (f / "config.json").write_text("[]"),
        ("config.json: is not a JSON object",),
    ),
    "config is deep": (lambda f: (f / "config.json").write_text('{"a":' * 99999), ("config.json", "JSON")),
    "remote code": (
        lambda f: edit_config(f, auto_map={"AutoModel": "x.y"}),
        ("config.json", "auto_map", "code"),
    ),
    "quantization is a list": (lambda f: edit_config(f, quantization_config=[1]), ("quantization_config",)),
    "more layers": (lambda f: edit_config(f, num_hidden_layers=4), ("says 4 layers, the weights have 3",)),
    "fewer layers": (lambda f: edit_config(f, num_hidden_layers=2), ("says 2 layers, the weights have 3",)),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_damaged_checkpoint(
    case: str, broken: Callable[[Damage], Path], refused: Callable[..., Outcome]
) -> None:
    damage, words = CHECKPOINTS[case]
    path = broken(damage)
    refused(4, str(path), *words, model={"path": str(path)})
    assert not Path("/tmp/pwned").exists()


CONFIGS: list[dict[str, Any]] = [
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": -1},
    {"num_hidden_layers": 0},
    {"num_hidden_layers": "x"},
    {"num_hidden_layers": 3.0},
    {"num_hidden_layers": True},
    {"hidden_size": -64},
    {"hidden_size": 0},
    {"hidden_size": 10**18},
    {"hidden_size": "x"},
    {"intermediate_size": -5},
    {"intermediate_size": 10**30},
    {"vocab_size": -1},
    {"vocab_size": 10**18},
    {"num_attention_heads": 0},
    {"num_attention_heads": -1},
    {"num_key_value_heads": 0},
    {"head_dim": 0},
    {"head_dim": -2},
    {"head_dim": 15},
    {"head_dim": 10**12},
    {"hidden_act": "nonsense"},
    {"rope_parameters": "x"},
    {"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1e4}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}},
    {"rope_scaling": {"type": "linear", "factor": "x"}},
    {"pad_token_id": 99999},
    {"attention_bias": True},
    {"tie_word_embeddings": "x"},
    {"dtype": "nonsense"},
    {"layer_types": ["full_attention"] * 2},
    {"layer_types": "x"},
    {"self": 1},
]


@pytest.mark.parametrize("change", CONFIGS, ids=lambda change: str(change)[1:60])
def test_config_that_lies(
    change: dict[str, Any], broken: Callable[[Damage], Path], refused: Callable[..., Outcome]
) -> None:
    path = broken(lambda folder: edit_config(folder, **change))
    refused(4, str(path), model={"path": str(path)})


def test_config_cannot_fill_the_memory(broken: Callable[[Damage], Path]) -> None:
    """transformers makes a table of `num_labels` entries, of which a language model needs none."""
    path = broken(lambda folder: edit_config(folder, num_labels=200_000))
    try:
        assert len(open_checkpoint(path).hf_config.id2label) < 1000
    except MkaqError as error:
        assert error.exit_code == 4


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["flash_attention_2", "nonsense", "kernels-community/flash-attn"])
def test_config_does_not_choose_the_code_that_runs(
    name: str, value: str, broken: Callable[[Damage], Path], recipe: Callable[..., Path], mkaq: Mkaq
) -> None:
    path = broken(lambda folder: edit_config(folder, **{name: value}))
    outcome = mkaq("plan", recipe(model={"path": str(path)}))
    assert outcome.code in (0, 4), outcome.err


UNSUPPORTED: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "unknown family": (lambda f: edit_config(f, model_type="gpt2"), ("'gpt2'", "supported families: llama")),
    "family is a list": (lambda f: edit_config(f, model_type=["llama"]), ("model_type",)),
    "no family": (lambda f: edit_config(f, model_type=None), ("model_type",)),
    "unknown list": (lambda f: edit_config(f, layer_scales=[1, 2, 3]), ("layer_scales", "per-layer list")),
    "dense first": (lambda f: edit_config(f, first_k_dense_replace=1), ("first_k_dense_replace",)),
    "quantized": (
        lambda f: edit_config(f, quantization_config={"quant_method": "awq"}),
        ("is quantized already (awq)", "fix: start from the original weights"),
    ),
    "embedding of integers": (change_tensors(lambda t: t.update({EMBED: t[EMBED].int()})), ("I32",)),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_model(
    case: str, broken: Callable[[Damage], Path], refused: Callable[..., Outcome]
) -> None:
    damage, words = UNSUPPORTED[case]
    path = broken(damage)
    refused(3, str(path), *words, model={"path": str(path)})


def test_own_artifact_as_a_source(whole: Path, refused: Callable[..., Outcome]) -> None:
    refused(3, "is quantized already (gptq)", model={"path": str(whole / "artifact")})


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "float8_e4m3fn"])
def test_weights_of_a_type_that_is_none(
    dtype: str, broken: Callable[[Damage], Path], recipe: Callable[..., Path], mkaq: Mkaq, folder: Path
) -> None:
    """Integers are codes of some quantization: taken as weights they would give a wrong model, silently."""
    path = broken(change_up(lambda weight: weight.to(getattr(torch, dtype))))
    outcome = mkaq("run", recipe(model={"path": str(path)}), "--output", folder)
    assert outcome.code in (3, 4), outcome.err
    one_message(outcome, outcome.code, UP)


@pytest.mark.parametrize("method", [None, "gptq", "bitsandbytes"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_weights_that_are_no_numbers(
    value: float,
    method: str | None,
    broken: Callable[[Damage], Path],
    recipe: Callable[..., Path],
    mkaq: Mkaq,
    folder: Path,
    earlier: Path,
) -> None:
    """NaN, infinity, and numbers so large that the model's own sums overflow."""
    path = broken(change_up(lambda weight: weight.fill_(value)))
    quantize = {"method": method, "bits": 8} if method else None
    if method == "gptq":
        quantize = {"method": "gptq", "group_size": 64}
    changes: dict[str, Any] = {"quantize": quantize, "evaluate": None, "model": {"path": str(path)}}
    outcome = mkaq("run", recipe(**changes, **({"merge": None} if method else {})), "--output", folder)
    if value == 3e38:
        assert outcome.code in (3, 4), outcome.err
        one_message(outcome, outcome.code)
    else:
        one_message(outcome, 4, str(path), UP, "NaN or infinity")
    now, before = kept(folder), kept(earlier)
    changed = {name for name in now.keys() | before.keys() if now.get(name) != before.get(name)}
    assert {name.partition("/")[0] for name in changed} <= {"calibrate"}
    assert mkaq("verify", folder / "artifact").code == 0


# --- text and sizes ----------------------------------------------------------------------------


def test_group_size_that_does_not_divide(refused: Callable[..., Outcome]) -> None:
    quantize = {"method": "gptq", "group_size": 128}
    refused(3, "quantize.group_size", "group_size 128 does not divide the 64 inputs", "64", quantize=quantize)


def test_sizes_that_gptq_cannot_pack(refused: Callable[..., Outcome], tmp_path: Path) -> None:
    path = make_model(tmp_path / "odd", layers=3, intermediate_size=72)
    refused(3, "gate_proj is 72 x 64", "multiples of 32", model={"path": str(path)})


def test_more_layers_than_can_be_merged(refused: Callable[..., Outcome]) -> None:
    merge = {"layers": 2, "protect": {"first": 1, "last": 1}}
    refused(2, "merge: 2 of 3 layers cannot be merged away", "fix: ", merge=merge)
    refused(2, "merge: 0 of 3 layers cannot be merged away", merge={"ratio": 0.01})


def test_fusing_with_too_few_samples(text: Path, refused: Callable[..., Outcome]) -> None:
    calibration = {"dataset": "text", "path": str(text), "num_samples": 7, "max_seq_length": 32}
    words = ("calibration.num_samples: 7 samples are too few", "fix: use at least 8")
    refused(2, *words, merge=CHANNELS, calibration=calibration)


@pytest.mark.parametrize("sections", [{"merge": CHANNELS}, {"merge": FREE, "budget": {"bytes": "1GB"}}])
def test_fusing_what_cannot_be_fused(
    sections: dict[str, Any], refused: Callable[..., Outcome], tmp_path: Path
) -> None:
    path = make_model(tmp_path / "gemma2", "gemma2", layers=3)
    words = ("merge.fuse: channels: gemma2 normalizes what its layers write", "fix: use fuse: average")
    refused(3, *words, model={"path": str(path)}, **sections)


def test_samples_longer_than_the_model_reads(text: Path, refused: Callable[..., Outcome]) -> None:
    calibration = {"dataset": "text", "path": str(text), "max_seq_length": 257}
    refused(2, "calibration.max_seq_length: 257 is longer", "256", calibration=calibration)


def text_fails(
    mkaq: Mkaq, recipe: Callable[..., Path], folder: Path, words: tuple[str, ...], **sections: Any
) -> None:
    """A fault of the text shows when it is read: logs change, nothing else does."""
    before = kept(folder)
    one_message(mkaq("run", recipe(evaluate=None, **sections), "--output", folder), 2, *words)
    assert kept(folder) == before
    assert mkaq("verify", folder / "artifact").code == 0


def short_text(path: Path) -> dict[str, Any]:
    """A calibration section that reads a little of a text file."""
    return {"dataset": "text", "path": str(path), "num_samples": 8, "max_seq_length": 32}


def test_calibration_text_that_is_too_short(
    mkaq: Mkaq, recipe: Callable[..., Path], folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("Too short. " * 20)
    calibration = short_text(tmp_path / "short.txt")
    words = ("calibration", "too little text", "8 samples of 32 need", "fix: give more text")
    text_fails(mkaq, recipe, folder, words, calibration=calibration)


@pytest.mark.parametrize(
    ("dataset", "content", "words"),
    [
        ("text", None, ("no such file or folder",)),
        ("text", b"\xff\xfe", ("cannot be read as UTF-8",)),
        ("text", b" \n", ("holds no text",)),
        ("jsonl", b'{"text": "x"}\n{"txt": 1}\n', ("line 2",)),
        ("mmlu", b"", ("no data/dev folder",)),
        ("wikitext2", b"", ("holds no text",)),
    ],
)
def test_calibration_text_that_cannot_be_read(
    dataset: str,
    content: bytes | None,
    words: tuple[str, ...],
    mkaq: Mkaq,
    recipe: Callable[..., Path],
    folder: Path,
    tmp_path: Path,
) -> None:
    path = tmp_path / "data.txt"
    if content is not None:
        path.write_bytes(content)
    calibration = {"dataset": dataset, "path": str(path), "num_samples": 8, "max_seq_length": 32}
    text_fails(mkaq, recipe, folder, (str(path), *words), calibration=calibration)


def test_path_of_nobody_s_home(mkaq: Mkaq, recipe: Callable[..., Path], folder: Path) -> None:
    calibration = {"dataset": "text", "path": "~nosuchuser/x", "num_samples": 8, "max_seq_length": 32}
    text_fails(mkaq, recipe, folder, ("~nosuchuser/x",), calibration=calibration)


def test_calibration_text_that_is_all_the_same(
    mkaq: Mkaq, recipe: Callable[..., Path], folder: Path, tmp_path: Path
) -> None:
    """Hardly anything to compare layers by: it is said, or computed without NaN."""
    (tmp_path / "same.txt").write_text("the " * 5000)
    calibration = short_text(tmp_path / "same.txt")
    outcome = mkaq("run", recipe(evaluate=None, calibration=calibration), "--output", folder)
    assert outcome.code in (0, 2), outcome.err
    for tensor in load_file(folder / "merge" / "similarity.safetensors").values():
        assert bool(tensor.isfinite().all())
    assert mkaq("verify", folder / "artifact").code == 0


def test_model_that_says_the_same_to_everything(
    mkaq: Mkaq,
    recipe: Callable[..., Path],
    broken: Callable[[Damage], Path],
    folder: Path,
    earlier: Path,
) -> None:
    path = broken(change_tensors(lambda t: t.update({EMBED: t[EMBED] * 0})))
    outcome = mkaq("run", recipe(evaluate=None, model={"path": str(path)}), "--output", folder)
    assert outcome.code in (2, 4), outcome.err
    one_message(outcome, outcome.code)
    assert tree(folder / "merge") == tree(earlier / "merge")


def lose_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def fewer_tokens(folder: Path) -> None:
    """A model that knows 100 tokens, with a tokenizer that gives 4096."""
    change_tensors(lambda t: t.update({n: t[n][:100].clone() for n in (EMBED, "lm_head.weight")}))(folder)
    edit_config(folder, vocab_size=100)


TOKENIZERS: dict[str, tuple[Damage, str]] = {
    "missing": (lose_tokenizer, "no usable tokenizer"),
    "no JSON": (lambda f: (f / "tokenizer.json").write_text("{"), "no usable tokenizer"),
    "config is no JSON": (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer_config.json"),
    "remote code": (
        lambda f: (f / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["a.b", null]}}'),
        "remote code",
    ),
    "more tokens than the model": (fewer_tokens, "token"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
@pytest.mark.parametrize("evaluated", [False, True])
def test_tokenizer_that_cannot_be_used(
    case: str,
    evaluated: bool,
    broken: Callable[[Damage], Path],
    recipe: Callable[..., Path],
    mkaq: Mkaq,
    folder: Path,
    earlier: Path,
) -> None:
    damage, word = TOKENIZERS[case]
    path = broken(damage)
    sections = {} if evaluated else {"evaluate": None}
    outcome = mkaq("run", recipe(model={"path": str(path)}, **sections), "--output", folder)
    one_message(outcome, 4, str(path), word)
    for stage in ("merge", "quantize", "artifact", "evaluate"):
        assert tree(folder / stage) == tree(earlier / stage)


def test_no_tokenizer_is_needed_where_no_text_is_read(
    broken: Callable[[Damage], Path], recipe: Callable[..., Path], mkaq: Mkaq, tmp_path: Path
) -> None:
    path = broken(lose_tokenizer)
    quantize = {"method": "bitsandbytes", "bits": 8}
    changed = recipe(model={"path": str(path)}, merge=None, quantize=quantize, evaluate=None)
    assert mkaq("run", changed, "--output", tmp_path / "new").code == 0


@pytest.mark.parametrize("arguments", [("analyze",), ("eval",), ("generate", "x"), ("verify", "--source")])
def test_other_commands_refuse_a_damaged_model(
    arguments: tuple[str, ...], broken: Callable[[Damage], Path], whole: Path, mkaq: Mkaq
) -> None:
    path = broken(only_pickle)
    name, *rest = arguments
    line = (name, whole / "artifact", "--source", path) if name == "verify" else (name, path, *rest)
    one_message(mkaq(*line), 4, str(path), "pickle")


def edit_quantization(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"].update(changes)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def change_parts(ending: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    """Changes all tensors whose names end so."""
    return change_tensors(lambda t: t.update({n: edit(t[n]) for n in list(t) if n.endswith(ending)}))


ARTIFACTS: dict[str, tuple[str, Damage]] = {
    "unknown method": ("gptq", edit_quantization(quant_method="awq")),
    "no method": ("gptq", lambda f: edit_config(f, quantization_config={})),
    "other bits": ("gptq", edit_quantization(bits=8)),
    "no bits": ("gptq", edit_quantization(bits="x")),
    "other group size": ("gptq", edit_quantization(group_size=64)),
    "no group size": ("gptq", edit_quantization(group_size=0)),
    "group 10^6": ("gptq", change_parts(".g_idx", lambda t: t + 10**6)),
    "group -5": ("gptq", change_parts(".g_idx", lambda t: t - 5)),
    "scales are NaN": ("gptq", change_parts(".scales", lambda t: t * float("nan"))),
    "codes are floats": ("gptq", change_parts(".qweight", lambda t: t.float())),
    "codes are missing": ("gptq", change_tensors(lambda t: t.pop(UP.replace("weight", "qweight")))),
    "int8 as 4 bits": ("int8", edit_quantization(load_in_8bit=False, load_in_4bit=True)),
    "int8 threshold": ("int8", edit_quantization(llm_int8_threshold="x")),
    "int8 codes are floats": ("int8", change_parts("proj.weight", lambda t: t.float())),
    "code nf5": ("nf4", edit_quantization(bnb_4bit_quant_type="nf5")),
    "type load": ("nf4", edit_quantization(bnb_4bit_compute_dtype="load")),
    "state is no JSON": ("nf4", change_parts("bitsandbytes__nf4", lambda t: t * 0)),
    "scales too few": ("nf4", change_parts(".absmax", lambda t: t[:1].clone())),
    "table of NaN": ("nf4", change_parts(".quant_map", lambda t: t * float("nan"))),
}


@pytest.fixture(scope="module")
def artifacts(
    whole: Path, model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    made = {"gptq": whole / "artifact"}
    for name, bits in (("int8", 8), ("nf4", 4)):
        folder = tmp_path_factory.mktemp(name)
        quantize = {"method": "bitsandbytes", "bits": bits}
        path = write_recipe(folder / "r.yaml", model, text, merge=None, quantize=quantize, evaluate=None)
        made[name] = run_quietly(path, folder / "run") / "artifact"
    return made


@pytest.mark.parametrize("case", ARTIFACTS)
def test_quantized_checkpoint_that_lies(
    case: str, artifacts: dict[str, Path], mkaq: Mkaq, tmp_path: Path
) -> None:
    """An artifact of somebody else is a checkpoint like any other: not trusted, whatever it says."""
    method, damage = ARTIFACTS[case]
    path = shutil.copytree(artifacts[method], tmp_path / "artifact")
    assert mkaq("generate", path, "To be", "--max-new-tokens", 1).code == 0
    damage(path)
    outcome = mkaq("generate", path, "To be", "--max-new-tokens", 1)
    assert outcome.code in (3, 4), outcome.err
    one_message(outcome, outcome.code, str(path))
    one_message(mkaq("verify", path), 5)


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory, model: Path, text: Path) -> Path:
    """An artifact whose layers were fused and tuned. Not to be changed: copy it first."""
    folder = tmp_path_factory.mktemp("fused")
    recover = {"method": "layerwise", "steps": 2, "batch_size": 4}
    plain: dict[str, Any] = {"merge": CHANNELS, "recover": recover, "quantize": None, "evaluate": None}
    return run_quietly(write_recipe(folder / "r.yaml", model, text, **plain), folder / "run") / "artifact"


def fusion(manifest: Any) -> Any:
    """What a manifest says of the fused layer."""
    return manifest["steps"][0]["layers"][1]["fused"]


FUSIONS: dict[str, tuple[Callable[[Any], object], tuple[str, ...]]] = {
    "digest of origins": (
        lambda m: fusion(m).update(origins_sha256="0" * 64),
        ("layer 1: its origins are not those of the manifest",),
    ),
    "residual": (
        lambda m: fusion(m).update(residual=0.001),
        ("layer 1 fused again leaves an error of", "says 0.001"),
    ),
    "residual of the first": (
        lambda m: m["steps"][0]["layers"][0]["fused"].update(residual=0.5),
        ("layer 0 fused again leaves an error of 0,", "says 0.5"),
    ),
    "ridge": (lambda m: fusion(m)["mlp"].update(ridge=7.0), ("layer 1: down_proj solved again has",)),
    "error of o_proj": (
        lambda m: fusion(m)["attention"].update(error=0.001),
        ("layer 1: o_proj solved again has",),
    ),
    "shares": (
        lambda m: m["steps"][0]["layers"][1].update({"from": {"1": 0.25, "2": 0.75}}),
        ("layer 1: its channels do not have the shares that the manifest says",),
    ),
    "groups": (
        lambda m: m["steps"][0]["layers"][1].update({"from": {"1": 1.0}}),
        ("do not stand for all layers of the source",),
    ),
    "not fused": (lambda m: m["steps"][0]["layers"][1].update(fused=None), ("layer 1: its origins",)),
    "a fused layer less": (lambda m: m["steps"][0]["layers"].pop(), ("has 2 layers, the manifest 1",)),
    "error of a tuned layer": (
        lambda m: m["steps"][1]["layers"][1].update(error=0.001),
        ("layer 1 leaves an error of", "says 0.001"),
    ),
    "a tuned layer less": (
        lambda m: m["steps"][1]["layers"].pop(),
        ("the recovered layers are not 0 to 1",),
    ),
    "a tuned layer more": (
        lambda m: m["steps"][1]["layers"].append(m["steps"][1]["layers"][0]),
        ("the recovered layers are not 0 to 1",),
    ),
    "tuned for the worse": (
        lambda m: m["steps"][1]["layers"][1].update(error_before=0.0),
        ("recovered layer 1 is said to be worse",),
    ),
}


@pytest.mark.parametrize("case", FUSIONS)
def test_forged_fusion(case: str, fused: Path, model: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    edit, words = FUSIONS[case]
    path = shutil.copytree(fused, tmp_path / "artifact")
    forge(path, edit)
    assert mkaq("verify", path).code == 0
    one_message(mkaq("verify", path, "--source", model), 5, str(path), *words)


def test_forged_recipe_of_a_fusion(fused: Path, model: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    path = shutil.copytree(fused, tmp_path / "artifact")
    forge(path, lambda m: m.update(recipe={}))
    one_message(mkaq("verify", path, "--source", model), 5, "mkaq-manifest.json", "recipe")


def test_forged_budget(fused: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    path, chosen = shutil.copytree(fused, tmp_path / "artifact"), {"removed": 7, "bits": None, "bytes": 1}
    forge(path, lambda m: m.update(budget={"target": {}, "tried": [], "chosen": chosen}))
    one_message(mkaq("verify", path), 5, str(path), "the budget chose 7 layers")


def origins_with(edit: Callable[[Any], object]) -> Callable[[bytes], bytes]:
    def damage(data: bytes) -> bytes:
        origins = json.loads(data)
        edit(origins)
        return json.dumps(origins).encode()

    return damage


ORIGINS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut short": lambda data: data[: len(data) // 2],
    "no text": lambda data: b"\xff\xfe" + data,
    "a number": lambda data: b"5",
    "a mapping": lambda data: b"{}",
    "no layers": lambda data: b"[]",
    "a layer less": origins_with(lambda o: o.pop()),
    "no heads": origins_with(lambda o: o[1].pop("heads")),
    "layer x": origins_with(lambda o: o[1].update(heads={"x": [0, 1]})),
    "channel x": origins_with(lambda o: o[1].update(channels={"1": ["x"]})),
    "channels are a list": origins_with(lambda o: o[1].update(channels=[0, 1])),
    "infinity": lambda data: data.replace(b"[0", b"[Infinity", 1),
    "too deep": lambda data: b"[" * 100_000,
    "number too long": origins_with(lambda o: o[1].update(heads={"1": [0, 10**30]})),
}
NUMBERS: dict[str, Callable[[Any], object]] = {  # under a digest that fits
    "a channel that is not there": lambda o: o["channels"].update({"2": [*range(127), 128], "1": []}),
    "a channel below 0": lambda o: o["channels"].update({"2": [-1, *range(127)], "1": []}),
    "a channel twice": lambda o: o["channels"].update({"2": [0, *range(127)], "1": []}),
    "a channel less": lambda o: o["channels"].update({"2": list(range(127)), "1": []}),
    "another group": lambda o: o["heads"].update({"0": [0, 1], "1": [], "2": []}),
}


@pytest.mark.parametrize("case", [*ORIGINS, *NUMBERS])
def test_damaged_origins(case: str, fused: Path, model: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    """Somebody's mkaq-origins.json with a manifest that fits it is not trusted either."""
    path = shutil.copytree(fused, tmp_path / "artifact")
    file = path / "mkaq-origins.json"
    damage = ORIGINS.get(case) or origins_with(lambda o: NUMBERS[case](o[1]))
    file.write_bytes(damage(file.read_bytes()))
    one_message(mkaq("verify", path), 5, "mkaq-origins.json")

    def sign(manifest: Any) -> None:
        data = file.read_bytes()
        for entry in manifest["files"]:
            if entry["path"] == file.name:
                entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        if case in NUMBERS:
            fusion(manifest).update(origins_sha256=digest_of(json.loads(data)[1]))

    forge(path, sign)
    words = ("layer 1: its ",) if case in NUMBERS else ("mkaq-origins.json",)
    one_message(mkaq("verify", path, "--source", model), 5, str(path), *words)


def test_forging_no_fusion_is_no_forgery(fused: Path, model: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    path = shutil.copytree(fused, tmp_path / "artifact")
    forge(path, lambda manifest: None)
    assert tree(path) == tree(fused) and mkaq("verify", path, "--source", model).code == 0


def test_folder_that_is_no_artifact(model: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    for name in ("verify", "inspect"):
        one_message(mkaq(name, model), 5, str(model), "no manifest")
        one_message(mkaq(name, tmp_path / "nowhere"), 5, "nowhere", "no manifest")


# --- places, disk, memory ----------------------------------------------------------------------


@pytest.mark.parametrize("below", ["file", "file/run", "link", "/dev/null/run"])
def test_folder_that_cannot_be_written(
    below: str, mkaq: Mkaq, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    one_message(
        mkaq("run", recipe(), "--output", tmp_path / below), 2, below, "cannot be written", "--output"
    )
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", [".lock", ".calibrate.partial", ".merge.partial"])
def test_read_only_folder(
    name: str,
    mkaq: Mkaq,
    recipe: Callable[..., Path],
    folder: Path,
    earlier: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also one that becomes read-only in the middle of a run. Root may write anywhere, so it is faked."""

    def denied(method: Any) -> Any:
        def maybe(self: Path, *arguments: Any, **options: Any) -> Any:
            if self.name == name:
                raise PermissionError(errno.EACCES, "Permission denied", str(self))
            return method(self, *arguments, **options)

        return maybe

    monkeypatch.setattr(Path, "open", denied(Path.open))
    monkeypatch.setattr(Path, "mkdir", denied(Path.mkdir))
    outcome = mkaq("run", recipe(), "--output", folder)
    one_message(outcome, 2, str(folder), "written", "--output")
    for stage in ("merge", "quantize", "artifact"):
        assert tree(folder / stage) == tree(earlier / stage)
    assert mkaq("verify", folder / "artifact").code == 0


def test_files_of_others_in_the_folder_stay(mkaq: Mkaq, recipe: Callable[..., Path], tmp_path: Path) -> None:
    """--output may be a home folder: nothing there is mkaq's because of its name."""
    mine = tmp_path / "home"
    (mine / "deep" / ".cache.partial").mkdir(parents=True)
    (mine / ".vim.old").mkdir()
    for name in (
        ".bashrc",
        ".bashrc.old",
        ".profile.old",
        ".vim.old/x",
        "deep/.cache.partial/x",
        ".x.partial",
    ):
        (mine / name).write_text(name)
    before = tree(mine)
    outcome = mkaq("run", recipe(), "--output", mine, "--until", "calibrate")
    assert outcome.code == 0, outcome.err
    assert {name: data for name, data in tree(mine).items() if name in before} == before


def test_two_runs_in_one_folder(mkaq: Mkaq, recipe: Callable[..., Path], folder: Path) -> None:
    before = tree(folder)
    with locked(folder):
        outcome = mkaq("run", recipe(), "--output", folder)
    one_message(outcome, 2, str(folder), "another mkaq run is working here", "fix: wait for it")
    assert tree(folder) == before


def test_disk_that_is_too_small(refused: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(total=10**9, used=10**9, free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    refused(6, "of disk, 1.00 KB are free", "fix: choose another folder", merge={"layers": 1, **PROTECT})


def test_memory_that_is_too_small(refused: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(total=10**8, available=10**8, free=10**8)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    refused(6, "of memory, cpu has 100.00 MB", "fix: lower num_samples")


def test_memory_that_runs_out(
    mkaq: Mkaq, recipe: Callable[..., Path], folder: Path, earlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr("mkaq.merge.stage.write_layer", out)
    one_message(mkaq("run", recipe(), "--output", folder), 6, "out of memory")
    assert tree(folder / "merge") == tree(earlier / "merge")


@pytest.mark.parametrize("place", ["calibrate/handoff.json", "merge/handoff.json", ".artifact.handoff.json"])
@pytest.mark.parametrize("content", ["{", "[]", '{"fingerprint": "x", "files": []}', "\udcff"])
def test_damaged_handoff(
    place: str, content: str, mkaq: Mkaq, recipe: Callable[..., Path], whole: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / place).write_bytes(content.encode(errors="surrogateescape"))
    before = kept(folder)
    outcome = mkaq("run", recipe(), "--output", folder)
    one_message(outcome, 5, str(folder / place), "handoff is damaged", "fix: delete it, or use --fresh")
    assert kept(folder) == before


# --- interrupted -------------------------------------------------------------------------------

# The stage in which it happens; the function after whose n-th call it happens.
POINTS = [
    ("calibrate", "mkaq.stages.save_file", 1),
    ("merge", "mkaq.merge.stage.write_layer", 2),
    ("merge", "mkaq.merge.stage.write_side_files", 1),
    ("evaluate/merge", "mkaq.stages.write_json", 1),
    ("quantize", "mkaq.quantize.gptq_stage.pack_linear", 9),
    ("quantize", "mkaq.stages.write_json", 2),
    ("evaluate/quantize", "mkaq.stages.write_json", 3),
    ("artifact", "mkaq.export.artifact.model_card", 1),
    ("artifact", "mkaq.export.artifact.write_manifest", 1),
]
FULL = OSError(errno.ENOSPC, "No space left on device")


def stop_after(patch: pytest.MonkeyPatch, target: str, call: int, error: BaseException) -> None:
    """Lets a function work until its n-th call, and raises after that one."""
    module, _, name = target.rpartition(".")
    original = getattr(__import__(module, fromlist=[name]), name)
    calls = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        result = original(*arguments, **options)
        calls += 1
        if calls == call:
            raise error
        return result

    patch.setattr(target, counted)


def stopped_in(stage: str, folder: Path, earlier: Path, whole: Path) -> None:
    """The stages before `stage` are published, the others are the earlier run's, and that is all."""
    expected = {}
    for number, name in enumerate(STAGES):
        origin = whole if number < STAGES.index(stage) else earlier
        expected |= {f"{name}/{file}": data for file, data in tree(origin / name).items()}
    for name in (".artifact.handoff.json", "report.html"):
        expected[name] = (earlier / name).read_bytes()
    found = kept(folder)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


CTRL_C = (KeyboardInterrupt(), 75, ("interrupted", "fix: the same command resumes"))
DISK_FULL = (FULL, 6, ("disk is full", "the same command resumes"))


STOPS = [(*point, *CTRL_C) for point in POINTS] + [(*point, *DISK_FULL) for point in POINTS[1:8:2]]


@pytest.mark.parametrize(
    ("stage", "target", "call", "error", "code", "words"),
    STOPS,
    ids=[f"{stop[0]} {stop[1].rpartition('.')[2]} {stop[4]}" for stop in STOPS],
)
def test_stop_in_a_stage(
    stage: str,
    target: str,
    call: int,
    error: BaseException,
    code: int,
    words: tuple[str, ...],
    mkaq: Mkaq,
    recipe: Callable[..., Path],
    folder: Path,
    earlier: Path,
    whole: Path,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, target, call, error)
        outcome = mkaq("run", recipe(), "--output", folder)
    one_message(outcome, code, *words)
    stopped_in(stage, folder, earlier, whole)
    verified = mkaq("verify", folder / "artifact")
    assert verified.code == 0, verified.err

    outcome = mkaq("run", recipe(), "--output", folder)
    assert outcome.code == 0, outcome.err
    assert told(outcome) == {name: n < STAGES.index(stage) for n, name in enumerate(STAGES)} | {
        "evaluate/source": True
    }
    assert tree(folder / "artifact") == tree(whole / "artifact")


@pytest.mark.parametrize("stage", ["merge", "artifact"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), FULL], ids=["Ctrl-C", "disk full"])
def test_stop_while_a_stage_is_put_in_its_place(
    stage: str,
    error: BaseException,
    mkaq: Mkaq,
    recipe: Callable[..., Path],
    folder: Path,
    earlier: Path,
    whole: Path,
) -> None:
    """Between the two renames: the old stage has left its place, the new one has not come."""
    rename = Path.rename

    def stop(self: Path, target: Path) -> Path:
        if self.name == f".{stage}.partial":
            raise error
        return rename(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", stop)
        outcome = mkaq("run", recipe(), "--output", folder)
    assert outcome.code in (6, 75)
    stopped_in(stage, folder, earlier, whole)
    assert mkaq("run", recipe(), "--output", folder).code == 0
    assert tree(folder / "artifact") == tree(whole / "artifact")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_a_process(
    sent: signal.Signals, mkaq: Mkaq, recipe: Callable[..., Path], folder: Path, earlier: Path, whole: Path
) -> None:
    """A real process, in the middle of a stage: it says where it is, and waits for the signal there."""
    wait = "print('here', file=sys.stderr, flush=True), time.sleep(60)"
    hold = f"import time, mkaq.merge.stage; mkaq.merge.stage.write_layer = lambda *_: ({wait})"
    process = subprocess.Popen(
        command("run", recipe(), "--output", folder, first=hold),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder.parent,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a shell's background job ignores it
    )
    assert process.stderr is not None
    with process:
        lines = []
        while not lines or lines[-1] not in ("here\n", ""):
            lines.append(process.stderr.readline())
        assert (folder / ".merge.partial" / ".part-0").exists()
        os.kill(process.pid, sent)
        out, err = process.communicate(timeout=60)
    outcome = Outcome(process.returncode, out, "".join(lines) + err)
    one_message(outcome, 75, "interrupted", "the same command resumes")
    stopped_in("merge", folder, earlier, whole)
    assert mkaq("verify", folder / "artifact").code == 0
    outcome = mkaq("run", recipe(), "--output", folder)
    assert outcome.code == 0, outcome.err
    assert told(outcome) == {stage: stage in ("evaluate/source", "calibrate") for stage in STAGES}
    assert tree(folder / "artifact") == tree(whole / "artifact")


def test_interrupt_of_a_command_that_writes_nothing(
    mkaq: Mkaq, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, "mkaq.evaluate.perplexity.summarize", 1, KeyboardInterrupt())
    options = ("--dataset", "text", "--path", text, "--num-samples", 2, "--max-seq-length", 32)
    one_message(mkaq("eval", model, *options), 75, "interrupted")


def test_recipes_of_the_tests_differ(earlier: Path, whole: Path) -> None:
    """Else a stage of the earlier run could pass for one of the later."""
    for stage in STAGES:
        same = tree(earlier / stage) == tree(whole / stage)
        assert same == (stage == "evaluate/source")
    assert yaml.safe_load((earlier / "recipe.yaml").read_text())["name"] == "earlier"


def test_folders_that_mkaq_did_not_make_are_left_alone(
    mkaq: Mkaq, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "mine" / "merge").mkdir(parents=True)
    (tmp_path / "mine" / "merge" / "thesis.txt").write_text("mine")
    one_message(mkaq("run", recipe(), "--output", tmp_path / "mine"), 2, "mine", "merge", "did not make")
    assert (tmp_path / "mine" / "merge" / "thesis.txt").read_text() == "mine"


def test_link_that_leaves_the_model_folder(
    broken: Callable[[Damage], Path], recipe: Callable[..., Path], mkaq: Mkaq, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("secret")
    path = broken(lambda folder: (folder / "chat_template.jinja").symlink_to(tmp_path / "secret"))
    outcome = mkaq("run", recipe(model={"path": str(path)}), "--output", tmp_path / "run")
    one_message(outcome, 4, "chat_template.jinja", "leaves the folder")


def test_model_of_the_hub_cache_is_read_through_its_links(tiny: Path, tmp_path: Path, mkaq: Mkaq) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(tiny.iterdir())):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    done = mkaq("eval", snapshot, "--num-samples", 2, "--max-seq-length", 32)
    assert done.code == 0, done.err


def test_sequences_longer_than_the_model_knows(mkaq: Mkaq, tiny: Path) -> None:
    one_message(mkaq("eval", tiny, "--max-seq-length", 512), 2, "512 tokens", "256 positions")


def test_debug_may_stand_behind_the_command(mkaq: Mkaq) -> None:
    outcome = mkaq("run", "nonesuch.yaml", "--debug")
    assert outcome.code == 2 and "Traceback" in outcome.err and "no such recipe" in outcome.err
