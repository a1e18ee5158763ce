"""The random checkpoints of real shapes that benchmarks use, made tiny."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import shapes
from benchmarks.shapes import CONFIGS, write_checkpoint
from mkaq.calibrate.tokenizer import load_tokenizer
from mkaq.checkpoint.layout import fill_shards
from mkaq.checkpoint.validate import open_checkpoint

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "max_position_embeddings": 128,
}
PARAMETERS = {  # as the models' cards and index files say
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-7b": 7_615_616_512,
}


@pytest.mark.parametrize("shape", CONFIGS)
def test_shapes_have_the_parameters_of_the_real_models(shape: str) -> None:
    sizes = shapes.layout_of(CONFIGS[shape]).values()
    assert sum(size.nbytes for size in sizes) == 2 * PARAMETERS[shape]


def test_files_are_cut_as_on_the_hub() -> None:
    """Meta-Llama-3-8B has four files, of 4.98, 5.00, 4.92 and 1.17 GB."""
    files = fill_shards(shapes.layout_of(CONFIGS["llama3-8b"]), shapes.SHARD_SIZE)
    sizes = [sum(spec.nbytes for spec in file.values()) for file in files]
    assert [round(size / 1e7) for size in sizes] == [498, 500, 492, 117]
    assert list(files[-1])[-1] == "lm_head.weight"


@pytest.mark.parametrize("shape", CONFIGS)
def test_checkpoint_loads_and_its_activations_are_finite(shape: str, tmp_path: Path) -> None:
    size = write_checkpoint(tmp_path, shape, layers=6, **TINY)
    source = open_checkpoint(tmp_path)
    assert source.num_layers == 6 and source.nbytes == size and source.dtype == torch.bfloat16
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    states = model(torch.arange(64)[None], output_hidden_states=True).hidden_states
    assert all(0.1 < state.std() < 100 for state in states[1:])
    assert max(load_tokenizer(tmp_path)("a text").input_ids) < 4096


def test_layers_and_rows_differ(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama3-8b", layers=3, **TINY)
    source = open_checkpoint(tmp_path)
    names = [f"model.layers.{index}.mlp.up_proj.weight" for index in range(3)]
    weights = source.read(names)
    assert not any(torch.equal(weights[names[0]], weights[name]) for name in names[1:])
    assert len(weights[names[0]].unique(dim=0)) == len(weights[names[0]])
    assert weights[names[0]].float().std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert source.read(["model.norm.weight"])["model.norm.weight"].unique().tolist() == [1.0]


def test_seed_decides_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "SHARD_SIZE", 400_000)
    found = []
    for number, seed in enumerate((0, 0, 1)):
        write_checkpoint(tmp_path / str(number), "mistral-7b", 2, seed, **TINY)
        found.append({path.name: path.read_bytes() for path in (tmp_path / str(number)).iterdir()})
    assert found[0] == found[1] != found[2]
    assert "model.safetensors.index.json" in found[0]
