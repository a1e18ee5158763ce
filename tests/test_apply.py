"""The merge itself: a weighted sum of every tensor, in float32, cast once at the end."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mkaq.merge.apply import merge_layers, weighted_sum
from mkaq.merge.plan import MergePlan
from mkaq.merge.stage import merged_layers
from mkaq.model.checkpoint import open_checkpoint
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
    merged = merge_layers(layers, {7: 0.25, 8: 0.75})
    assert sorted(merged) == sorted(names)
    for name in names:
        assert torch.equal(merged[name], layers[7][name] * 0.25 + layers[8][name] * 0.75)


def test_layers_are_added_in_the_order_of_the_weights() -> None:
    layers = {i: {"w": tensor} for i, tensor in enumerate(tensors(torch.float32))}
    forward = merge_layers(layers, dict(enumerate(WEIGHTS)))["w"]
    backward = merge_layers(layers, dict(reversed(list(enumerate(WEIGHTS)))))["w"]
    assert torch.equal(forward, weighted_sum([layers[i]["w"] for i in range(3)], WEIGHTS))
    assert not torch.equal(forward, backward)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_checkpoint_merges_norms_and_biases_and_keeps_lone_layers(tmp_path: Path, dtype: torch.dtype) -> None:
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
