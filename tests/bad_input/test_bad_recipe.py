"""Recipes with faults, that do not fit their model, or whose text cannot be used."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.runs import Mkaq, Outcome, kept, one_message
from tests.tiny import CHANNELS, make_model

HEAD = "version: 1\nname: x\nmodel: {path: m}\n"
MEASURED = "evaluate: {perplexity: {dataset: builtin}}\n"
FREE = {key: value for key, value in CHANNELS.items() if key != "layers"}
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
    "long hexadecimal number": (
        HEAD + f"merge: {{layers: 0x{'f' * 5000}}}\n",
        2,
        ("is not YAML", "line 4", "no value of the type int"),
    ),
    "number beyond a float": (
        HEAD + f"merge: {{ratio: 1{':00' * 250}.5}}\n",
        2,
        ("is not YAML", "line 4", "no value of the type float"),
    ),
    "tag of a truth value": (
        HEAD + "quantize: {method: gptq, sym: !!bool maybe}\n",
        2,
        ("is not YAML", "line 4", "'maybe' is no value of the type bool"),
    ),
    "tag of a date": (HEAD + "merge: {ratio: !!timestamp x}\n", 2, ("is not YAML", "line 4", "timestamp")),
    "tag of a number": (HEAD + "merge: {layers: !!int ''}\n", 2, ("is not YAML", "line 4", "type int")),
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
    "onnx": (HEAD + "export: {formats: [safetensors, onnx]}\n", 3, ("line 4, export.formats: onnx",)),
    "only gguf": (HEAD + "export: {formats: [gguf]}\n", 2, ("line 4", "names safetensors")),
    "gguf twice": (HEAD + "export: {formats: [safetensors, gguf, gguf]}\n", 2, ("each format once",)),
    "gguf that is not written": (HEAD + "export: {gguf: {embedding: f16}}\n", 2, ("nothing reads",)),
    "later option and fault": (
        HEAD + "export: {formats: [onnx]}\nzzz: 1\n",
        2,
        ("line 4, export.formats: onnx is made from", "line 5, zzz: unknown key"),
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
        ("line 5, recover: method is required: distill or layerwise",),
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
    "limit without measuring": (
        HEAD + "quantize: {method: gptq}\nevaluate: {limit: 2.0}\n",
        2,
        ("line 5, evaluate: limit is read with perplexity only; leave it out",),
    ),
    "limit below the source": (
        HEAD + MEASURED.replace("}}", "}, limit: 0.5}"),
        2,
        ("line 4, evaluate.limit:", "greater than or equal to 1, not 0.5"),
    ),
    "limit of no number": (
        HEAD + MEASURED.replace("}}", "}, limit: 5%}"),
        2,
        ("line 4, evaluate.limit:", "not '5%'"),
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
        (f"merge.layers=0x{'f' * 5000}", ("--set merge.layers: ", "no value of the type int")),
        (f"merge.ratio=1{':00' * 250}.5", ("--set merge.ratio: ", "no value of the type float")),
        ("quantize.sym=!!bool maybe", ("--set quantize.sym: 'maybe' is no value of the type bool",)),
        ("merge.ratio=!!timestamp x", ("--set merge.ratio: 'x' is no value of the type timestamp",)),
        ("merge.layers=!!int ''", ("--set merge.layers: '' is no value of the type int",)),
        ("model.path=!!python/object/apply:os.system [id]", ("os.system",)),
    ],
)
def test_setting_with_a_fault(setting: str, words: tuple[str, ...], refused: Callable[..., Outcome]) -> None:
    refused(2, *words, arguments=("--set", setting))


def test_a_setting_in_the_place_of_a_list_has_no_line_of_it(refused: Callable[..., Outcome]) -> None:
    export = {"formats": ["safetensors", "gguf"]}
    setting = "export.formats=[safetensors, ggufs]"
    outcome = refused(2, "--set export.formats", "'ggufs'", arguments=("--set", setting), export=export)
    assert "line " not in outcome.err


# --- recipes that do not fit their model -------------------------------------------------------


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


# --- recipes whose text cannot be used ---------------------------------------------------------


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
    if outcome.code:
        one_message(outcome, 2)
        assert not (folder / "analyze").exists()
    else:
        for tensor in load_file(folder / "analyze" / "similarity.safetensors").values():
            assert bool(tensor.isfinite().all())
    assert mkaq("verify", folder / "artifact").code == 0
