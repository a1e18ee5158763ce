"""The MLX export: the same codes in MLX's affine form, decoded alike by MLX itself."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mkaq.checkpoint.reader import Checkpoint
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.errors import UnsupportedError
from mkaq.export import mlx
from mkaq.export.codes import Codes, read_codes
from mkaq.export.settings import Settings
from mkaq.walk.whole_model import whole_model
from tests.exports import decoded_by, make_gptq
from tests.runs import python_of, tree
from tests.test_export_compressed import change, weights_of
from tests.tiny import FAMILIES, edit_config

pytestmark = pytest.mark.usefixtures("one_thread")
PYTHON = python_of("mlx")
NAME, SETTINGS = "model.layers.0.mlp.up_proj", Settings("tiny")
WIDE = {"hidden_size": 128, "head_dim": 32}
OPTIONS: list[dict[str, Any]] = [{"family": family} for family in FAMILIES]
OPTIONS += [{"bits": bits, "sym": sym} for bits in (2, 3, 4, 8) for sym in (True, False)]
OPTIONS += [
    {"bits": 4, "group_size": size, "sym": sym, **WIDE} for size in (64, 128) for sym in (True, False)
]
OPTIONS += [{"rope_theta": 500.0}]
needs_mlx = pytest.mark.skipif(
    not PYTHON.exists(), reason=f"no mlx-lm at {PYTHON} (make .venv-mlx/ready makes it)"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A GPTQ checkpoint with zero points. Not to be changed."""
    return make_gptq(tmp_path_factory.mktemp("model"), sym=False)


def written(model: Checkpoint, folder: Path) -> Path:
    folder.mkdir()
    mlx.write(model, folder, SETTINGS)
    return folder


@needs_mlx
def test_mlx_decodes_the_same_weights(tmp_path: Path) -> None:
    ids = torch.randint(2, 4096, (2, 20), generator=torch.Generator().manual_seed(3))

    def checked(model: Checkpoint, folder: Path) -> Path:
        assert list(mlx.check(model, written(model, folder), SETTINGS)) == []
        return folder

    found = decoded_by("mlx_worker.py", PYTHON, OPTIONS, checked, ids, tmp_path)
    for option, model, theirs in found:
        ours, logits = weights_of(model), theirs.pop("logits")
        assert ours.keys() == theirs.keys(), option
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), option
        with torch.no_grad():
            expected = whole_model(model, torch.device("cpu"), torch.float32)(ids, use_cache=False).logits
        error = ((logits - expected).norm() / expected.norm()).item()
        assert error < 0.01, (option, error)  # it runs partly in bfloat16


def test_the_same_bytes_twice(tmp_path: Path, model: Checkpoint) -> None:
    assert tree(written(model, tmp_path / "one")) == tree(written(model, tmp_path / "two"))


def test_rotary_settings_are_where_mlx_reads_them(tmp_path: Path) -> None:
    path = make_gptq(tmp_path).path
    rope = {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}
    edit_config(path, rope_parameters=rope, rope_theta=None)
    config = mlx.mlx_config(open_checkpoint(path, quantized=True))
    assert config["rope_theta"] == 500.0
    assert config["rope_scaling"] == {"rope_type": "linear", "type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("weight", "up_proj.weight does not hold"),
        ("scales", "up_proj.scales does not hold"),
        ("biases", "up_proj.biases does not hold"),
    ],
)
def test_every_damage_is_found(tmp_path: Path, model: Checkpoint, part: str, words: str) -> None:
    folder = written(model, tmp_path / "out")
    copy = shutil.copytree(folder, tmp_path / "copy")
    change(f"0.mlp.up_proj.{part}", lambda t: (t.view(torch.int32) ^ 1).view(t.dtype))(copy)
    assert any(words in fault for fault in mlx.check(model, copy, SETTINGS))
    edit_config(folder, quantization={"group_size": 64, "bits": 4, "mode": "affine"})
    assert any("config.json" in fault for fault in mlx.check(model, folder, SETTINGS))


def test_what_it_cannot_hold_is_refused(tmp_path: Path, model: Checkpoint) -> None:
    gptq = {"quant_method": "gptq", "desc_act": False, "group_size": 64}
    assert mlx.refusal(model, gptq) == ""
    assert "not -1" in mlx.refusal(model, {**gptq, "group_size": -1})
    assert "lie apart" in mlx.refusal(model, {**gptq, "desc_act": True})
    assert "nothing was quantized" in mlx.refusal(model, None)
    with pytest.raises(UnsupportedError, match="not 16"):
        written(make_gptq(tmp_path, group_size=16), tmp_path / "out")


def test_a_bias_beyond_float16_is_refused(tmp_path: Path) -> None:
    model = make_gptq(tmp_path)
    change("up_proj.scales", lambda t: torch.full_like(t, 60000.0))(model.path)
    with pytest.raises(UnsupportedError, match=r"256 of 256 products .* are no torch\.float16"):
        written(model, tmp_path / "out")


def test_a_power_of_two_times_a_scale_is_exact_and_three_times_seldom() -> None:
    scales = torch.arange(1, 31744, dtype=torch.int16).view(torch.float16).reshape(-1, 1)  # every one above 0
    small = scales[scales < 60]
    for zero in (2, 4, 8, 128):
        mlx.biases(Codes(small, small, torch.full(small.shape, zero)), torch.float16)
    with pytest.raises(ValueError) as lost:
        mlx.biases(Codes(small, small, torch.full(small.shape, 3)), torch.float16)
    assert 0.5 < int(str(lost.value).split()[0]) / small.numel() < 1


def test_of_zero_points_most_products_are_no_float16(model: Checkpoint) -> None:
    codes = read_codes(model, NAME)
    mlx.biases(codes, torch.float32)
    with pytest.raises(ValueError, match="products"):
        mlx.biases(codes, torch.float16)
