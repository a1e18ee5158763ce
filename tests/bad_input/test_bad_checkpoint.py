"""Models that are missing, damaged, unsupported, or lie."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mkaq.checkpoint.validate import open_checkpoint
from mkaq.errors import MkaqError
from tests.bad_input.after import added
from tests.bad_input.damage import (
    EMBED,
    INDEX,
    SHARDS,
    SINGLE,
    UP,
    Damage,
    change_bytes,
    change_header,
    change_tensors,
    change_up,
    lose_shard,
    only_pickle,
    shard,
    swap_shards,
)
from tests.runs import Mkaq, Outcome, one_message
from tests.tiny import edit_config


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
    "list in header": (
        change_header(lambda h: h.update({UP: [h[UP][key] for key in ("dtype", "shape", "data_offsets")]})),
        (SINGLE, UP, "described by a list"),
    ),
    "empty and huge": (
        change_header(lambda h: h.update(x={**h[UP], "shape": [0, 2**63], "data_offsets": [0, 0]})),
        (SINGLE, "x is empty"),
    ),
    # the index
    "index leaves the folder": (lambda f: shard(f, **{UP: "../x.safetensors"}), (INDEX, UP, "'../x.")),
    "index is absolute": (lambda f: shard(f, **{UP: "/tmp/x.safetensors"}), (INDEX, UP, "'/tmp/x.")),
    "index goes below": (lambda f: shard(f, **{UP: "sub/x.safetensors"}), (INDEX, UP, "'sub/x.")),
    "index names a pickle": (lambda f: shard(f, **{UP: "x.bin"}), (INDEX, UP, "'x.bin'")),
    "index names a number": (lambda f: shard(f, **{UP: 5}), (INDEX, UP)),
    "index with a null": (lambda f: shard(f, **{UP: f"{SHARDS[0]}\0"}), (INDEX, UP)),
    "index with a long name": (lambda f: shard(f, **{UP: f"{'x' * 5000}.safetensors"}), ("xxx",)),
    "index with a name of too many bytes": (
        lambda f: shard(f, **{UP: f"{'é' * 200}.safetensors"}),
        ("1 of 3 weight files missing",),
    ),
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
        lambda f: edit_config(f, model_type="own", auto_map={"AutoModel": "x.y"}),
        ("config.json", "auto_map", "code"),
    ),
    "remote code of no family": (
        lambda f: edit_config(f, model_type=["llama"], auto_map={"AutoModel": "x.y"}),
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


# --- weights -----------------------------------------------------------------------------------


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
    changes |= {"merge": None} if method else {}
    changes |= {"calibration": None} if method == "bitsandbytes" else {}
    outcome = mkaq("run", recipe(**changes), "--output", folder)
    if value == 3e38:
        assert outcome.code in (3, 4), outcome.err
        one_message(outcome, outcome.code)
    else:
        one_message(outcome, 4, str(path), UP, "NaN or infinity")
    assert added(folder, earlier) <= {"calibrate"}
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
    assert added(folder, earlier) == {"calibrate"}


@pytest.mark.parametrize("arguments", [("analyze",), ("eval",), ("generate", "x"), ("verify", "--source")])
def test_other_commands_refuse_a_damaged_model(
    arguments: tuple[str, ...], broken: Callable[[Damage], Path], whole: Path, mkaq: Mkaq
) -> None:
    path = broken(only_pickle)
    name, *rest = arguments
    line = (name, whole / "artifact", "--source", path) if name == "verify" else (name, path, *rest)
    one_message(mkaq(*line), 4, str(path), "pickle")
