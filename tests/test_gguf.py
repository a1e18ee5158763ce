"""A GGUF file holds the checkpoint bit for bit, and says so of the configuration; faults in it are found."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as library
import numpy as np
import pytest
import torch

from mkaq.checkpoint.reader import Checkpoint
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.errors import MkaqError, UnsupportedError, UsageError
from mkaq.export import gguf
from mkaq.export.gguf_metadata import unfit
from mkaq.export.settings import GgufTypes, Settings
from mkaq.formats.gptq import dequantize
from tests.tiny import make_gptq, make_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
FILE, ABOUT = "tiny.gguf", Settings("tiny", "org/tiny")
BIASES = {"attention_bias": True, "mlp_bias": True}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    **{family: (family, {}, None) for family in FAMILIES},
    "qwen2": ("qwen2", {"max_window_layers": 1}, None),
    **{f"{family}, 4 bits": (family, {}, {}) for family in FAMILIES},
    "llama, 2 bits": ("llama", {}, {"bits": 2, "sym": False, "group_size": 64}),
    "llama, 3 bits": ("llama", {}, {"bits": 3, "group_size": -1}),
    "llama, 8 bits": ("llama", {}, {"bits": 8}),
    "llama with biases": ("llama", BIASES, {"sym": False}),
    "llama, tied": ("llama", {"tie_word_embeddings": True, "head_dim": 32}, None),
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path]:
    """A checkpoint, and a folder with its GGUF file. Not to be changed."""
    family, changes, quantization = CASES[request.param]
    folder = tmp_path_factory.mktemp("gguf")
    path = make_model(folder / "model", family, layers=2, **changes)
    if quantization is not None:
        path = make_gptq(folder / "gptq", path, **quantization)
    model = open_checkpoint(path, quantized=True)
    (folder / "out").mkdir()
    gguf.write(model, folder / "out", ABOUT)
    return model, folder / "out"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path]:
    """A Llama with 4 bits, and a folder with its GGUF file. Not to be changed."""
    folder = tmp_path_factory.mktemp("small")
    make_gptq(folder / "model", make_model(folder / "dense", layers=1))
    model = open_checkpoint(folder / "model", quantized=True)
    (folder / "out").mkdir()
    gguf.write(model, folder / "out", ABOUT)
    return model, folder / "out"


def decoded(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file as float32."""
    result = {}
    for tensor in library.GGUFReader(path).tensors:
        values = library.quants.dequantize(tensor.data, tensor.tensor_type)
        result[tensor.name] = values.reshape([int(size) for size in reversed(tensor.shape)])
    return result


def keys(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in library.GGUFReader(path).fields.items()}


def halves_together(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes Llama's order of rows: neighbours of a head become its two halves."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def expected(model: Checkpoint) -> dict[str, np.ndarray]:
    """The checkpoint's weights as float32, decoded by mkaq's GPTQ reader."""
    tensors = model.read(model.tensors)
    result = {n: t for n, t in tensors.items() if n.endswith((".weight", ".bias"))}
    for module in [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]:
        parts = {part: tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
        result[f"{module}.weight"] = dequantize(parts, model.quantization or {})
    return {name: tensor.float().numpy() for name, tensor in result.items()}


def test_every_tensor_is_there_bit_for_bit(case: tuple[Checkpoint, Path]) -> None:
    model, folder = case
    found, wanted = decoded(folder / FILE), expected(model)
    arch = model.config["model_type"]
    names = library.get_tensor_name_map(
        getattr(library.MODEL_ARCH, "LLAMA" if arch == "mistral" else arch.upper()), model.num_layers
    )
    assert len(found) == len(wanted)
    for name, values in wanted.items():
        stored = found[names.get_name(name, (".weight", ".bias"))]
        heads = {"q_proj": model.sizes.heads, "k_proj": model.sizes.kv_heads}.get(name.split(".")[-2])
        if heads and arch in ("llama", "mistral"):
            stored = halves_together(stored, heads)
        assert np.array_equal(stored, values), name


def test_a_good_file_has_no_faults_and_is_made_again_to_the_byte(
    case: tuple[Checkpoint, Path], tmp_path: Path
) -> None:
    model, folder = case
    assert list(gguf.check(model, folder, ABOUT)) == []
    gguf.write(model, tmp_path, ABOUT)
    assert (tmp_path / FILE).read_bytes() == (folder / FILE).read_bytes()


def test_the_metadata_say_what_config_json_says(case: tuple[Checkpoint, Path]) -> None:
    model, folder = case
    found, config = keys(folder / FILE), model.hf_config
    arch = "llama" if config.model_type == "mistral" else config.model_type
    kinds = getattr(config, "layer_types", None) or []
    window = 24 if arch == "llama" != config.model_type or "sliding_attention" in kinds else 256
    assert found["general.architecture"] == arch and found["general.name"] == "tiny"
    assert found["general.base_model.0.name"] == "tiny"
    assert found[f"{arch}.context_length"] == window and found[f"{arch}.vocab_size"] == 4096
    assert found[f"{arch}.block_count"] == 2 and found[f"{arch}.attention.head_count_kv"] == 2
    assert found[f"{arch}.attention.key_length"] == model.sizes.head_dim
    assert found[f"{arch}.rope.freq_base"] == 10000.0
    assert found["tokenizer.ggml.model"] == "gpt2" and len(found["tokenizer.ggml.tokens"]) == 4096


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def swap(path: Path) -> None:
    """Exchanges two tensors of the same size."""
    gate, up = (t for t in library.GGUFReader(path).tensors if "ffn_gate" in t.name or "ffn_up" in t.name)
    data = bytearray(path.read_bytes())
    for one, other in ((gate, up), (up, gate)):
        data[one.data_offset : one.data_offset + one.n_bytes] = other.data.tobytes()
    path.write_bytes(data)


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit of a weight": (lambda path: flip(path, path.stat().st_size - 300), "another "),
    "swapped tensors": (swap, "another blk.0.ffn_gate.weight"),
    "a changed number": (
        lambda path: path.write_bytes(path.read_bytes().replace(b"rope.freq_base", b"rope.freq_bale")),
        "lacks llama.rope.freq_base",
    ),
    "a changed text": (
        lambda path: path.write_bytes(path.read_bytes().replace(b"org/tiny", b"org/tint")),
        "another general.base_model.0.repo_url",
    ),
    "a file cut short": (lambda path: path.write_bytes(path.read_bytes()[:-32]), ""),
    "something after the end": (
        lambda path: path.write_bytes(path.read_bytes() + bytes(32)),
        "bytes instead of",
    ),
    "no GGUF": (lambda path: path.write_bytes(b"GGUG" + path.read_bytes()[4:]), "cannot be read"),
    "nothing": (lambda path: path.unlink(), "cannot be read"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_check_finds(small: tuple[Checkpoint, Path], tmp_path: Path, name: str) -> None:
    model, folder = small
    shutil.copyfile(folder / FILE, tmp_path / FILE)
    change, message = FAULTS[name]
    change(tmp_path / FILE)
    faults = list(gguf.check(model, tmp_path, ABOUT))
    assert faults and any(message in fault for fault in faults), faults


def test_check_finds_every_flipped_byte_of_the_metadata(
    small: tuple[Checkpoint, Path], tmp_path: Path
) -> None:
    model, folder = small
    data = (folder / FILE).read_bytes()
    start = library.GGUFReader(folder / FILE).data_offset
    for place in [*range(8, 700, 61), *range(700, start - 32, start // 12)]:
        changed = bytearray(data)
        changed[place] ^= 4
        (tmp_path / FILE).write_bytes(changed)
        assert list(gguf.check(model, tmp_path, ABOUT)), place


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_the_embedding_has_the_type_asked_for(
    small: tuple[Checkpoint, Path], tmp_path: Path, kind: str
) -> None:
    about = ABOUT._replace(gguf=GgufTypes(embedding=kind))  # type: ignore[arg-type]
    model = small[0]
    if kind == "f16":  # bfloat16 reaches further than float16: the smallest weights do not fit
        with pytest.raises(UnsupportedError, match=r"\d+ of the 262144 values of .* do not fit f16 exactly"):
            gguf.write(model, tmp_path, about)
        return
    gguf.write(model, tmp_path, about)
    found = decoded(tmp_path / FILE)["token_embd.weight"]
    wanted = model.read(["model.embed_tokens.weight"])["model.embed_tokens.weight"].float().numpy()
    limit = {"q8_0": 0.01, "q4_0": 0.15}.get(kind, 0)
    assert np.linalg.norm(found - wanted) <= limit * np.linalg.norm(wanted)
    types = {t.name: t.tensor_type.name for t in library.GGUFReader(tmp_path / FILE).tensors}
    assert types["token_embd.weight"] == types["output.weight"] == kind.upper()
    assert types["blk.0.attn_q.weight"] == "Q4_0" and types["output_norm.weight"] == "F32"
    assert list(gguf.check(model, tmp_path, about)) == []
    other = ABOUT._replace(gguf=GgufTypes(embedding="q8_0" if kind != "q8_0" else "f32"))
    assert list(gguf.check(model, tmp_path, other))


def test_rope_of_llama3_becomes_factors(tmp_path: Path) -> None:
    rope = {
        **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    }
    model = open_checkpoint(make_model(tmp_path / "model", layers=1, rope_parameters=rope))
    gguf.write(model, tmp_path, ABOUT)
    factors = decoded(tmp_path / FILE)["rope_freqs.weight"]
    assert factors[0] == 1 and factors[-1] == pytest.approx(8) and (np.diff(factors) > -1e-6).all()


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gemma2": ("gemma2", {}, "every second layer"),
    "yarn": ("llama", {"rope_parameters": YARN | {"beta_fast": 16}}, "beta_fast"),
    "dynamic": ("llama", {"rope_parameters": YARN | {"rope_type": "dynamic"}}, "dynamic"),
    "part of a head": (
        "llama",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "whole",
    ),
    "an activation": ("llama", {"hidden_act": "gelu"}, "gelu"),
    "heads of their own": ("qwen2", {"head_dim": 32}, "head_dim"),
    "biases": ("qwen3", {"attention_bias": True}, "attention_bias"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_computes_in_another_way_is_refused(tmp_path: Path, name: str) -> None:
    family, changes, reason = REFUSED[name]
    model = open_checkpoint(make_model(tmp_path / "model", family, layers=2, **changes))
    assert reason in gguf.refusal(model, None)
    with pytest.raises(UnsupportedError, match=reason):
        gguf.write(model, tmp_path, ABOUT)
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bits": 8, "sym": False}, "9 bits"),
        ({"group_size": 16}, "multiple of 32"),
        ({"desc_act": True}, "static_groups"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
    ],
)
def test_codes_that_do_not_fit_are_refused(
    small: tuple[Checkpoint, Path], changes: dict[str, Any], reason: str
) -> None:
    plain = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    assert gguf.refusal(small[0], plain) == "" == gguf.refusal(small[0], None)
    assert reason in gguf.refusal(small[0], plain | changes)
    assert "was not tried" in unfit("falcon", None)


def test_rows_that_fit_no_blocks_are_refused(small: tuple[Checkpoint, Path]) -> None:
    settings = {**(small[0].quantization or {}), "group_size": 128}
    assert "64 weights" in gguf.refusal(small[0], settings)


def test_scattered_groups_are_refused_whatever_the_configuration_says(tmp_path: Path) -> None:
    path = make_gptq(tmp_path / "model", make_model(tmp_path / "dense", layers=1))
    model = open_checkpoint(path, quantized=True)
    with pytest.raises(UnsupportedError, match="lie apart"):
        gguf.write(Scattered(model.path, model.config, model.tensors), tmp_path, ABOUT)


class Scattered(Checkpoint):
    """A checkpoint in which the groups of columns are mixed."""

    def read(self, names: Any) -> dict[str, torch.Tensor]:
        return {name: t.flip(0) if name.endswith("g_idx") else t for name, t in super().read(names).items()}


def test_without_the_package_the_refusal_says_how_to_get_it(
    small: tuple[Checkpoint, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mkaq.export.gguf.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'mkaq\[gguf\]'"):
        gguf.refusal(small[0], None)


def test_a_damaged_tokenizer_is_one_error(small: tuple[Checkpoint, Path], tmp_path: Path) -> None:
    shutil.copytree(small[0].path, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(MkaqError, match="tokenizer"):
        gguf.write(open_checkpoint(tmp_path / "model", quantized=True), tmp_path, ABOUT)
