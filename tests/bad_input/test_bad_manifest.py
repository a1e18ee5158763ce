"""Artifacts whose manifest or origins are forged or damaged: `verify` finds it."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mkaq.digests import digest_of
from tests.runs import Mkaq, forge, one_message, run_quietly, tree
from tests.tiny import CHANNELS, write_recipe


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory, model: Path, text: Path) -> Path:
    """An artifact whose layers were fused and tuned. Not to be changed: copy it first."""
    recover = {"method": "layerwise", "steps": 20, "batch_size": 4, "learning_rate": 1e-3}
    calibration = {"dataset": "text", "path": str(text), "num_samples": 64, "max_seq_length": 32}
    folder = tmp_path_factory.mktemp("fused")
    return artifact_of(folder, model, text, recover=recover, calibration=calibration)


@pytest.fixture(scope="module")
def untuned(tmp_path_factory: pytest.TempPathFactory, model: Path, text: Path) -> Path:
    """An artifact whose layers were fused. Not to be changed: copy it first."""
    return artifact_of(tmp_path_factory.mktemp("untuned"), model, text)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory, model: Path, text: Path) -> Path:
    """An artifact whose layers were fused and quantized. Not to be changed: copy it first."""
    quantize = {"method": "gptq", "bits": 4, "group_size": 32}
    return artifact_of(tmp_path_factory.mktemp("rounded"), model, text, quantize=quantize)


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory, model: Path, text: Path) -> Path:
    """One quantized toward the source, its final norm rescaled again. Not to be changed: copy it first."""
    quantize = {"method": "gptq", "bits": 4, "group_size": 32, "target": "source"}
    return artifact_of(tmp_path_factory.mktemp("joint"), model, text, quantize=quantize)


def artifact_of(folder: Path, model: Path, text: Path, **sections: Any) -> Path:
    """What a recipe that fuses makes."""
    plain: dict[str, Any] = {"merge": CHANNELS, "quantize": None, "evaluate": None}
    recipe = write_recipe(folder / "r.yaml", model, text, **plain | sections)
    return run_quietly(recipe, folder / "run") / "artifact"


def fusion(manifest: Any) -> Any:
    """What a manifest says of the fused layer."""
    return manifest["steps"][0]["layers"][1]["fused"]


FUSIONS: dict[str, tuple[Callable[[Any], object], tuple[str, ...]]] = {
    "digest of origins": (
        lambda m: fusion(m).update(origins_sha256="0" * 64),
        ("layer 1: its origins are not those of the manifest",),
    ),
    "ridge": (
        lambda m: fusion(m)["mlp"].update(ridge=7.0),
        ("layer 1: down_proj is said to be solved with a ridge of 7",),
    ),
    "no ridge, another error": (
        lambda m: fusion(m)["mlp"].update(ridge=None, error_before=0.25),
        ("layer 1: down_proj is said to be as it was, and to leave another error",),
    ),
    "shares": (
        lambda m: m["steps"][0]["layers"][1].update({"from": {"1": 0.25, "2": 0.75}}),
        ("layer 1: its channels do not have the shares that the manifest says",),
    ),
    "groups": (
        lambda m: m["steps"][0]["layers"][1].update({"from": {"1": 1.0}}),
        ("do not stand for all layers of the source",),
    ),
    "factor of the final norm": (
        lambda m: m["steps"][0]["final_norm"].update(scale=0.5),
        ("model.norm.weight is not the source's, rescaled",),
    ),
    "no factor of the final norm": (lambda m: m["steps"][0].update(final_norm=None), ("model.norm.weight",)),
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
        lambda m: m["steps"][1]["layers"][0].update(error=0.5),
        ("recovered layer 0 is said to be worse",),
    ),
    "a last layer for the worse, and predictions no better": (
        lambda m: (
            m["steps"][1]["layers"][1].update(error_before=0.0),
            m["steps"][1].update(divergence_before=0.0, divergence=0.0),
        ),
        ("recovered layer 1 is said to be worse",),
    ),
    "predictions for the worse": (
        lambda m: m["steps"][1].update(divergence=9.0),
        ("the divergence is said to have grown",),
    ),
}


ERRORS: dict[str, tuple[str, Callable[[Any], object], tuple[str, ...]]] = {
    "residual": (
        "untuned",
        lambda m: fusion(m).update(residual=0.001),
        ("layer 1 leaves an error of", "says 0.001"),
    ),
    "residual of the first": (
        "untuned",
        lambda m: m["steps"][0]["layers"][0]["fused"].update(residual=0.5),
        ("layer 0 leaves an error of 0,", "says 0.5"),
    ),
    "error of o_proj": (
        "untuned",
        lambda m: fusion(m)["attention"].update(error=0.001),
        ("layer 1: o_proj leaves an error of", "says 0.001"),
    ),
    "error of down_proj": (
        "untuned",
        lambda m: fusion(m)["mlp"].update(error=0.001),
        ("layer 1: down_proj leaves an error of", "says 0.001"),
    ),
    "no ridge where one is": (
        "untuned",
        lambda m: fusion(m)["mlp"].update(ridge=None, error_before=fusion(m)["mlp"]["error"]),
        ("model.layers.1.mlp.down_proj.weight is not what the recorded merge gives",),
    ),
    "error of the final norm": (
        "untuned",
        lambda m: m["steps"][0]["final_norm"].update(error=0.001),
        ("the final norm leaves an error of", "says 0.001"),
    ),
    "factor of the final norm": (
        "untuned",
        lambda m: m["steps"][0]["final_norm"].update(scale=0.5),
        ("model.norm.weight is not the source's, rescaled",),
    ),
    "no factor of the final norm": (
        "untuned",
        lambda m: m["steps"][0].update(final_norm=None),
        ("model.norm.weight",),
    ),
    "error of the norm after quantizing": (
        "joint",
        lambda m: m["steps"][1]["final_norm"].update(error=0.001),
        ("the final norm leaves an error of", "says 0.001"),
    ),
    "residual of a quantized layer": (
        "rounded",
        lambda m: m["steps"][1]["residuals"].__setitem__(1, 0.001),
        ("layer 1 leaves an error of", "says 0.001"),
    ),
    "no residuals": (
        "rounded",
        lambda m: m["steps"][1].update(residuals=None),
        ("the quantized layers have no recorded errors",),
    ),
    "a residual less": (
        "rounded",
        lambda m: m["steps"][1]["residuals"].pop(),
        ("1 errors are recorded for 2 quantized layers",),
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_forged_error(
    case: str, request: pytest.FixtureRequest, model: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    made, edit, words = ERRORS[case]
    path = shutil.copytree(request.getfixturevalue(made), tmp_path / "artifact")
    assert mkaq("verify", path, "--source", model).code == 0
    forge(path, edit)
    assert mkaq("verify", path).code == 0
    one_message(mkaq("verify", path, "--source", model), 5, str(path), *words)


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


UNREADABLE: dict[str, tuple[Callable[[Any], object], str]] = {  # of `whole`: averaged, quantized, measured
    "no layers": (lambda m: m["steps"][0].update(layers=[]), "steps.0.merge.layers: "),
    "no modules": (lambda m: m["steps"][1].update(modules=[]), "steps.1.quantize.modules: "),
    "bytes beyond 64 bits": (lambda m: m["source"].update(bytes=10**400), "source.bytes: "),
    "bytes below 0": (lambda m: m["files"][0].update(bytes=-1), "files.0.bytes: "),
    "parameters beyond 64 bits": (
        lambda m: m["steps"][0].update(parameters_after=2**63),
        "steps.0.merge.parameters_after: ",
    ),
    "perplexity is a text": (
        lambda m: m["evaluation"]["merge"]["perplexity"].update(perplexity="5"),
        "evaluation.merge.perplexity: ",
    ),
    "no perplexity": (
        lambda m: m["evaluation"].update(source={"perplexity": {}}),
        "evaluation.source.perplexity: ",
    ),
    "measurements are a list": (
        lambda m: m["evaluation"]["merge"].update(perplexity=[]),
        "evaluation.merge.perplexity: ",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_manifest_that_no_run_writes(case: str, whole: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    edit, words = UNREADABLE[case]
    path = shutil.copytree(whole / "artifact", tmp_path / "artifact")
    forge(path, edit)
    for name in ("inspect", "verify"):
        one_message(mkaq(name, path), 5, "mkaq-manifest.json: is altered: ", words)


def test_manifest_that_is_nested_too_deep(whole: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    path, deep = shutil.copytree(whole / "artifact", tmp_path / "artifact"), list[Any]()
    for _ in range(300):
        deep = [deep]
    forge(path, lambda m: m["recipe"].update(x=deep))
    for command in (("inspect", path, "--json"), ("inspect", path), ("verify", path)):
        one_message(mkaq(*command), 5, "mkaq-manifest.json: is damaged: ", "depth")


def test_file_of_a_name_too_long_is_missing(whole: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    path = shutil.copytree(whole / "artifact", tmp_path / "artifact")
    forge(path, lambda m: m["files"][0].update(path="x" * 300))
    one_message(mkaq("verify", path), 5, str(path), "xxx is missing")


def test_tuning_without_steps(fused: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    path = shutil.copytree(fused, tmp_path / "artifact")
    forge(path, lambda m: m["steps"][1]["settings"].pop("steps"))
    for name in ("inspect", "verify"):
        one_message(mkaq(name, path), 5, "mkaq-manifest.json: is altered: ", "steps.1.recover.settings: ")


def test_layer_that_is_not_fused_among_those_that_are(fused: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    path = shutil.copytree(fused, tmp_path / "artifact")
    forge(path, lambda m: m["steps"][0]["layers"][1].update(fused=None))
    assert mkaq("inspect", path).code == 0


def test_group_merged_into_itself(whole: Path, model: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    path = shutil.copytree(whole / "artifact", tmp_path / "artifact")
    forge(path, lambda m: m["steps"][0]["merges"][0].update({"into": 1, "from": 1}))
    words = "the merge of 1 into 1 names a layer that is gone"
    one_message(mkaq("verify", path, "--source", model), 5, str(path), words)


def test_seed_that_is_left_out_is_the_default(untuned: Path, model: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    path = shutil.copytree(untuned, tmp_path / "artifact")
    forge(path, lambda m: m["recipe"]["calibration"].pop("seed"))
    assert mkaq("verify", path, "--source", model).code == 0


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
        one_message(mkaq(name, tmp_path / "nowhere"), 2, "nowhere", "no such folder")
        one_message(mkaq(name, model / "config.json"), 2, "config.json", "is a file")
