"""The merge itself: a weighted sum of every tensor, in float32, cast once at the end."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mkaq.checkpoint import reader
from mkaq.checkpoint.output import Output
from mkaq.checkpoint.reader import Checkpoint
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.errors import CheckpointError
from mkaq.merge.average import merge_layers, weighted_sum
from mkaq.merge.averaged import averaged_blocks, averaged_layers, merged_layers
from mkaq.merge.groups import MergePlan
from mkaq.merge.write import digest_layer, write_merged
from mkaq.progress import Progress
from tests.tiny import make_model

WEIGHTS = (0.83 * 0.41, 0.17 * 0.41, 0.59)


def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(40, 50, generator=generator).to(dtype) for _ in WEIGHTS]


def recorded_sum(parts: list[torch.Tensor]) -> torch.Tensor:
    """What a reader of the manifest computes: float32, one rounding for each product and each sum."""
    total = np.zeros(parts[0].shape, dtype=np.float32)
    for part, weight in zip(parts, WEIGHTS, strict=True):
        total = total + part.float().numpy() * np.float32(weight)
    return torch.from_numpy(total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sum_is_the_recorded_combination_bit_for_bit(dtype: torch.dtype) -> None:
    parts = tensors(dtype)
    merged = weighted_sum(parts, WEIGHTS)
    assert merged.dtype == dtype
    assert torch.equal(merged, recorded_sum(parts).to(dtype))
    assert torch.allclose(
        merged.double(), sum(p.double() * w for p, w in zip(parts, WEIGHTS, strict=True)), atol=0.02
    )


def test_cast_comes_once_at_the_end() -> None:
    parts = tensors(torch.bfloat16)
    in_between = parts[0] * WEIGHTS[0]
    for part, weight in zip(parts[1:], WEIGHTS[1:], strict=True):
        in_between = in_between + part * weight
    chain = (parts[0] * 0.83 + parts[1] * 0.17) * 0.41 + parts[2] * 0.59
    merged = weighted_sum(parts, WEIGHTS)
    assert not torch.equal(merged, in_between) and not torch.equal(merged, chain)
    one, tiny = torch.ones(1, dtype=torch.bfloat16), torch.full((1,), 2.0**-8, dtype=torch.bfloat16)
    assert weighted_sum([one, tiny, tiny], [1.0, 1.0, 1.0]).item() == 1 + 2.0**-7  # each alone would vanish


def test_inputs_are_left_as_they_are() -> None:
    parts = tensors(torch.float32)
    copies = [part.clone() for part in parts]
    weighted_sum(parts, WEIGHTS)
    assert all(torch.equal(part, copy) for part, copy in zip(parts, copies, strict=True))


def test_lone_tensor_is_itself() -> None:
    exact = torch.tensor([1 / 3, -0.0, 1e-300], dtype=torch.float64)  # float32 would change it
    assert torch.equal(weighted_sum([exact], [1.0]), exact)
    assert weighted_sum([torch.ones(2)], [0.5]).tolist() == [0.5, 0.5]


def test_every_tensor_of_a_layer_is_merged() -> None:
    names = ["self_attn.q_proj.weight", "self_attn.q_proj.bias", "input_layernorm.weight"]
    layers = {index: dict(zip(names, tensors(torch.float32), strict=True)) for index in (7, 8)}
    layers[8] = {name: tensor + 1 for name, tensor in layers[7].items()}
    merged = merge_layers(layers.__getitem__, {7: 0.25, 8: 0.75})
    assert sorted(merged) == sorted(names)
    for name in names:
        assert torch.equal(merged[name], layers[7][name] * 0.25 + layers[8][name] * 0.75)


def test_layers_are_added_in_the_order_of_the_weights() -> None:
    layers = {i: {"w": tensor} for i, tensor in enumerate(tensors(torch.float32))}
    forward = merge_layers(layers.__getitem__, dict(enumerate(WEIGHTS)))["w"]
    backward = merge_layers(layers.__getitem__, dict(reversed(list(enumerate(WEIGHTS)))))["w"]
    assert torch.equal(forward, weighted_sum([layers[i]["w"] for i in range(3)], WEIGHTS))
    assert not torch.equal(forward, backward)


@pytest.mark.parametrize("block", [64, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_checkpoint_merges_norms_and_biases_and_keeps_lone_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block: int
) -> None:
    monkeypatch.setattr(reader, "BLOCK", block)
    source = open_checkpoint(make_model(tmp_path / "model", "qwen2", layers=3))
    plan = MergePlan((), ({0: 1.0}, {1: 0.3, 2: 0.7}))
    lone, merged = merged_layers(source, plan, dtype)
    old = [source.read(source.layer_tensor_names(index)) for index in range(3)]
    assert {"input_layernorm.weight", "self_attn.k_proj.bias"} < merged.keys()
    for name in merged:
        first, second = (old[index][f"model.layers.{index}.{name}"] for index in (1, 2))
        expected = (first.float() * 0.3 + second.float() * 0.7).to(dtype)
        assert torch.equal(merged[name], expected) and not torch.equal(expected, first.to(dtype))
        assert lone[name].dtype == dtype and torch.equal(lone[name], old[0][f"model.layers.0.{name}"])


def merged(source: Checkpoint, weights: list[dict[int, float]], folder: Path) -> list[dict[str, object]]:
    """Writes the average that `weights` say; returns the rows of its record."""
    folder.mkdir()
    plan = MergePlan((), tuple(weights))
    layers = averaged_layers(source, plan, source.dtype)
    output = Output(source.dtype, 200_000, Progress(quiet=True))
    return write_merged(source, layers, plan.kept, folder, output).rows


def test_pieces_of_a_group_are_read_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the group and large the tensor: one piece of each layer is in memory."""
    source = open_checkpoint(make_model(tmp_path / "model"))
    read, monkeypatched = [], reader._read_at

    def noted(handle: int, start: int, tensor: torch.Tensor, where: Path) -> None:
        read.append((start, tensor.nbytes))
        monkeypatched(handle, start, tensor, where)

    monkeypatch.setattr(reader, "BLOCK", 4096)
    monkeypatch.setattr(reader, "_read_at", noted)
    name, weights = "mlp.up_proj.weight", {1: 0.5, 2: 0.3, 3: 0.2}
    starts = [source.tensors[f"model.layers.{index}.{name}"].start for index in weights]
    for number, _ in enumerate(averaged_blocks(source, name, weights, torch.bfloat16)):
        assert read[-3:] == [(start + 4096 * number, 4096) for start in starts]
        assert len(read) == 3 * (number + 1)
    assert len(read) == 3 * 4


def test_merged_checkpoint_holds_the_outer_tensors_and_the_layers(tmp_path: Path) -> None:
    source = open_checkpoint(make_model(tmp_path / "model"))
    weights = [{0: 1.0}, {1: 0.25, 2: 0.75}, {3: 1.0}]
    rows = merged(source, weights, tmp_path / "out")
    out = open_checkpoint(tmp_path / "out")
    assert len(out.weight_files) > 1 and out.num_layers == 3
    expected = list(merged_layers(source, MergePlan((), tuple(weights)), source.dtype))
    for new, layer in enumerate(expected):
        stored = out.read(out.layer_tensor_names(new))
        assert {f"model.layers.{new}.{name}" for name in layer} == stored.keys()
        for name, tensor in layer.items():
            assert torch.equal(stored[f"model.layers.{new}.{name}"], tensor)
        assert rows[new]["sha256"] == digest_layer(layer)
    assert out.outer_tensor_names == source.outer_tensor_names
    for name in source.outer_tensor_names:
        assert torch.equal(out.read([name])[name], source.read([name])[name])


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_what_no_walk_reads_is_checked_too(tmp_path: Path, name: str) -> None:
    source = open_checkpoint(make_model(tmp_path / "model"))
    info = source.tensors[name]
    with (source.path / info.file).open("r+b") as file:
        file.seek(info.start + info.nbytes - 2)
        file.write(b"\x80\x7f")  # infinity in bfloat16
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity"):
        merged(source, [{index: 1.0} for index in range(4)], tmp_path / "out")
