"""Attention by matrix products against torch's own, and models that attend by it against transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from mkaq.checkpoint.validate import open_checkpoint
from mkaq.walk import attention
from mkaq.walk.attention import causal_attention
from mkaq.walk.walk import LayerWalk
from tests.tiny import FAMILIES, make_model


def made(length: int, heads: int, key_value_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key and value as a model hands them on: heads beside one another in memory."""
    generator = torch.Generator().manual_seed(length)
    counts = (heads, key_value_heads, key_value_heads)
    return [
        torch.randn(2, length, n, 16, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)
        for n in counts
    ]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize(("heads", "key_value_heads"), [(4, 4), (6, 2), (3, 1)])
def test_it_is_softmax_of_what_came_before(length: int, heads: int, key_value_heads: int) -> None:
    query, key, value = made(length, heads, key_value_heads, torch.float64)
    found = causal_attention(query, key, value, 0.3)
    expected = scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=True)
    assert torch.allclose(found, expected.transpose(1, 2), rtol=1e-12, atol=1e-12)


def test_first_token_sees_itself_alone_and_none_sees_what_follows() -> None:
    query, key, value = made(130, 4, 2, torch.bfloat16)
    found = causal_attention(query, key, value, 0.25)
    assert torch.equal(found[:, 0], value[:, :, 0].repeat_interleave(2, 1))
    key[:, :, 100:], value[:, :, 100:] = 7.0, -7.0
    changed = causal_attention(query, key, value, 0.25)
    assert torch.equal(changed[:, :100], found[:, :100])
    assert not torch.equal(changed[:, 100:], found[:, 100:])


@pytest.mark.parametrize("length", [64, 200])
def test_bfloat16_is_nearly_as_near_as_the_kernel_of_torch(length: int) -> None:
    query, key, value = made(length, 6, 2, torch.bfloat16)
    exact = causal_attention(query.double(), key.double(), value.double(), 0.25)

    def off(found: torch.Tensor) -> float:
        return float((found.double() - exact).norm() / exact.norm())

    kernel = scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.25, enable_gqa=True)
    assert off(causal_attention(query, key, value, 0.25)) < min(5e-3, 3 * off(kernel.transpose(1, 2)))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_walk_in_bfloat16_is_the_model(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that look back 24 tokens only (mistral, gemma2, one of qwen2) do so, and attend otherwise."""
    seen: list[int] = []

    def counted(*given: Any) -> torch.Tensor:
        seen.append(1)
        return causal_attention(*given)

    monkeypatch.setattr(attention, "causal_attention", counted)
    folder = make_model(tmp_path, family)
    tokens = torch.randint(2, 4096, (2, 80), generator=torch.Generator().manual_seed(1))
    walk = LayerWalk(open_checkpoint(folder), torch.device("cpu"), torch.bfloat16)
    walk.use_fast_attention()
    *_, (_, states) = walk.hidden_states(tokens)
    with walk.head() as head:
        found = head(states).float()
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
    assert float((found - expected).norm() / expected.norm()) < 2e-2
    assert len(seen) == {"mistral": 0, "gemma2": 0, "qwen2": 3}.get(family, walk.num_layers)
