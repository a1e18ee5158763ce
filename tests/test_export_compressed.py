"""The compressed-tensors export: the same codes, decoded alike by mkaq and by the library itself."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mkaq.checkpoint.reader import Checkpoint
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.errors import CheckpointError, UnsupportedError
from mkaq.export import compressed_tensors as export
from mkaq.export.settings import Settings
from mkaq.files import write_json
from mkaq.formats.formats import format_of
from mkaq.formats.layer import dense_layer
from mkaq.walk.whole_model import whole_model
from tests.exports import decoded_by, make_gptq
from tests.runs import python_of, tree
from tests.tiny import FAMILIES, edit_config

pytestmark = pytest.mark.usefixtures("one_thread")
PYTHON = python_of("compressed")
SETTINGS = Settings("tiny", shard_size=200_000)
ALL = [(bits, size, sym) for bits in (2, 3, 4, 8) for size in (32, -1) for sym in (True, False)]
needs_library = pytest.mark.skipif(
    not PYTHON.exists(), reason=f"no compressed-tensors at {PYTHON} (make .venv-compressed/ready makes it)"
)


@pytest.fixture(scope="module")
def asymmetric(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A GPTQ checkpoint with zero points. Not to be changed."""
    return make_gptq(tmp_path_factory.mktemp("asymmetric"), sym=False)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, asymmetric: Checkpoint) -> Path:
    """Its export. Not to be changed."""
    return export_of(asymmetric, tmp_path_factory.mktemp("exported"))


def export_of(model: Checkpoint, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    export.write(model, folder, SETTINGS)
    return folder


def weights_of(model: Checkpoint) -> dict[str, torch.Tensor]:
    """The decoded weight of every linear layer, by its module's name."""
    result = {}
    for index in range(model.num_layers):
        dense = dense_layer(model.read_layer(index), model.arch.linear_names, model.quantization)
        for name in model.arch.linear_names:
            result[model.arch.in_layer(index, name)] = dense[f"{name}.weight"]
    return result


@pytest.mark.parametrize(("bits", "size", "sym"), ALL)
def test_mkaq_reads_back_the_same_weights(tmp_path: Path, bits: int, size: int, sym: bool) -> None:
    model = make_gptq(tmp_path, bits=bits, group_size=size, sym=sym)
    folder = export_of(model, tmp_path / "out")
    assert list(export.check(model, folder, SETTINGS)) == []
    read = open_checkpoint(folder, quantized=True)
    assert format_of(read.quantization).bits(read.quantization or {}) == bits
    ours, theirs = weights_of(model), weights_of(read)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    shape = model.linear_shape("mlp.down_proj")
    stored = [i.nbytes for n, i in read.tensors.items() if n.startswith("model.layers.0.mlp.down_proj.")]
    assert format_of(read.quantization).stored_bytes(shape, read.quantization or {}) == sum(stored)


def test_the_same_bytes_twice(tmp_path: Path, asymmetric: Checkpoint, exported: Path) -> None:
    assert len(open_checkpoint(exported, quantized=True).weight_files) > 1
    assert tree(export_of(asymmetric, tmp_path / "again")) == tree(exported)


@needs_library
def test_the_library_decodes_the_same_weights(tmp_path: Path) -> None:
    ids = torch.randint(2, 4096, (2, 40), generator=torch.Generator().manual_seed(3))
    options = [{"family": family} for family in FAMILIES]
    options += [{"family": "llama", "bits": b, "group_size": size, "sym": sym} for b, size, sym in ALL]
    found = decoded_by("compressed_worker.py", PYTHON, options, export_of, ids, tmp_path)
    for option, model, theirs in found:
        ours, logits = weights_of(model), theirs.pop("logits")
        assert ours.keys() == theirs.keys(), option
        if not option.get("sym", True):  # decoded at once, in the type of the scales
            ours = {name: weight.half().float() for name, weight in ours.items()}
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), option
        with torch.no_grad():
            expected = whole_model(model, torch.device("cpu"), torch.float32)(ids, use_cache=False).logits
        error = ((logits - expected).norm() / expected.norm()).item()
        assert error < (1e-5 if option.get("sym", True) else 2e-3), (option, error)


def change(name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Changes the tensors whose names end in a name."""

    def apply(folder: Path) -> None:
        for path in folder.glob("*.safetensors"):
            tensors = load_file(path)
            for key in [key for key in tensors if key.endswith(name)]:
                tensors[key] = edit(tensors[key]).contiguous()
            save_file(tensors, path, {"format": "pt"})

    return apply


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a code": (change("0.mlp.up_proj.weight_packed", lambda t: t ^ 1), "does not hold the model's codes"),
    "a scale": (change("1.mlp.up_proj.weight_scale", lambda t: t * 2), "does not hold the model's codes"),
    "a zero point": (change("q_proj.weight_zero_point", lambda t: t ^ 1), "does not hold the model's codes"),
    "a shape": (change("up_proj.weight_shape", lambda t: t.flip(0)), "does not hold the model's codes"),
    "a norm": (change("model.norm.weight", lambda t: -t), "model.norm.weight is not the model's"),
    "a type": (change("model.norm.weight", lambda t: t.float()), "model.norm.weight is TensorSpec"),
    "a tensor's size": (change("model.norm.weight", lambda t: t[1:]), "model.norm.weight is TensorSpec"),
    "the configuration": (lambda folder: edit_config(folder, rms_norm_eps=1e-3), "config.json is not"),
    "the tokenizer": (lambda folder: write_json(folder / "tokenizer.json", {}), "tokenizer.json is not"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is not"),
    "another file": (lambda folder: write_json(folder / "quantize_config.json", {}), "does not belong here"),
    "a cut file": (lambda folder: next(folder.glob("*.safetensors")).write_bytes(b"1234"), "cut short"),
    "no weights": (lambda folder: next(folder.glob("*.safetensors")).unlink(), "missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_found(tmp_path: Path, asymmetric: Checkpoint, exported: Path, damage: str) -> None:
    apply, words = DAMAGES[damage]
    folder = shutil.copytree(exported, tmp_path / "copy")
    apply(folder)
    faults = list(export.check(asymmetric, folder, SETTINGS))
    assert faults and any(words in fault for fault in faults), faults


def test_what_it_cannot_hold_is_refused(tmp_path: Path, asymmetric: Checkpoint) -> None:
    scattered = {"quant_method": "gptq", "desc_act": True}
    assert "columns of a group lie apart" in export.refusal(asymmetric, scattered)
    assert "nothing was quantized" in export.refusal(asymmetric, None)
    assert "bitsandbytes" in export.refusal(asymmetric, {"quant_method": "bitsandbytes"})
    assert export.refusal(asymmetric, {"quant_method": "gptq", "desc_act": False}) == ""
    model = make_gptq(tmp_path)
    dense = open_checkpoint(tmp_path / "dense")
    with pytest.raises(UnsupportedError, match="nothing was quantized"):
        export_of(dense, tmp_path / "none")
    change("q_proj.g_idx", lambda t: t.flip(0))(model.path)
    with pytest.raises(UnsupportedError, match="lie apart"):
        export_of(model, tmp_path / "scattered")


def test_zero_points_that_contradict_or_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = make_gptq(tmp_path)
    change("q_proj.qzeros", lambda t: torch.full_like(t, -1))(model.path)  # stored minus one: 16
    with pytest.raises(CheckpointError, match="sym"):
        export_of(model, tmp_path / "sym")
    config = {**(model.quantization or {}), "sym": False}
    edit_config(model.path, quantization_config=config)
    with pytest.raises(UnsupportedError, match="does not fit into 4 bits"):
        export_of(open_checkpoint(model.path, quantized=True), tmp_path / "large")


FOREIGN = {
    "format": ({"format": "naive-quantized"}, "format 'naive-quantized'"),
    "status": ({"quantization_status": "frozen"}, "quantization_status"),
    "cache": ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    "ignore": ({"ignore": ["lm_head", "model.layers.0.mlp.up_proj"]}, "ignore list"),
    "no groups": ({"config_groups": {}}, "one config group"),
    "two groups": ({"config_groups": {"a": {}, "b": {}}}, "one config group"),
    "targets": ({"targets": ["re:.*up_proj"]}, "targets"),
    "activations": ({"input_activations": {"num_bits": 8}}, "activations"),
    "group's format": ({"format ": "float-quantized"}, "format 'float-quantized'"),
    "floats": ({"type": "float"}, "integers"),
    "order": ({"actorder": "group"}, "actorder"),
    "bits": ({"num_bits": 5}, "num_bits 5"),
    "group size": ({"group_size": "32"}, "group_size '32'"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_other_variants_are_refused_by_name(tmp_path: Path, exported: Path, case: str) -> None:
    folder = shutil.copytree(exported, tmp_path / "copy")
    config = open_checkpoint(folder, quantized=True).quantization
    assert config is not None
    group = config["config_groups"]["group_0"]
    for key, value in FOREIGN[case][0].items():
        if key.strip() != key or key in ("targets", "input_activations"):
            group[key.strip()] = value
        else:
            (group["weights"] if key in group["weights"] or key == "actorder" else config)[key] = value  # type: ignore[index]
    edit_config(folder, quantization_config=config)
    with pytest.raises((UnsupportedError, CheckpointError), match=FOREIGN[case][1]):
        open_checkpoint(folder, quantized=True)


def test_a_shape_that_contradicts_the_codes_is_refused(exported: Path) -> None:
    read = open_checkpoint(exported, quantized=True)
    name = "model.layers.0.mlp.up_proj."
    parts = read.read(n for n in read.tensors if n.startswith(name))
    tensors = {key.removeprefix(name): tensor for key, tensor in parts.items()}
    tensors["weight_shape"] = tensors["weight_shape"] + 1
    with pytest.raises(ValueError, match="weight_shape"):
        format_of(read.quantization).dequantize(tensors, read.quantization or {})
