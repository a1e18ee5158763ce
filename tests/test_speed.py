"""What benchmarks/speed.py rests on: unpacked weights, and the memory of a process tree."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.packed import unpack_weight, write_dense
from benchmarks.process_tree import CommandError, run_measured
from mkaq.files import write_json

MB = 10**6
FORKS = """
import os, time
held = bytearray(b"x") * (300 * 10**6)
if child := os.fork():
    os.waitpid(child, 0)
else:
    own = bytearray(b"x") * (200 * 10**6)
    time.sleep(0.5)
"""


def packed_example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-8..7 up and down again in 32 inputs, two groups of 16: words, scales and the weight."""
    integers = torch.tensor([[*range(-8, 8), *range(7, -9, -1)]])
    words = [0x76543210, 0xFEDCBA98, 0x89ABCDEF, 0x01234567]  # as compressed-tensors 0.19 packs them
    packed = torch.tensor([[word - 2**32 if word >= 2**31 else word for word in words]], dtype=torch.int32)
    scale = torch.tensor([[0.5, 2.0]], dtype=torch.bfloat16)
    return packed, scale, integers * torch.tensor([0.5] * 16 + [2.0] * 16)


def test_packed_integers_are_read_as_they_were_written() -> None:
    packed, scale, weight = packed_example()
    found = unpack_weight(packed, scale, 4)
    assert found.dtype == torch.float32
    assert torch.equal(found, weight)


def test_dense_checkpoint_has_plain_tensors_only(tmp_path: Path) -> None:
    packed, scale, weight = packed_example()
    (tmp_path / "packed").mkdir()
    tensors = {"a.weight_packed": packed, "a.weight_scale": scale, "a.weight_shape": torch.tensor([1, 32])}
    save_file({**tensors, "norm.weight": torch.ones(3)}, tmp_path / "packed" / "model.safetensors")
    groups = {"group_0": {"weights": {"num_bits": 4, "symmetric": True}}}
    config = {"hidden_size": 3, "quantization_config": {"format": "pack-quantized", "config_groups": groups}}
    write_json(tmp_path / "packed" / "config.json", config)
    write_dense(tmp_path / "packed", tmp_path / "dense")
    found = load_file(tmp_path / "dense" / "model.safetensors")
    assert set(found) == {"a.weight", "norm.weight"}
    assert torch.equal(found["a.weight"], weight)
    assert "quantization_config" not in (tmp_path / "dense" / "config.json").read_text()


def test_peak_is_seen_after_it_is_over() -> None:
    code = 'held = bytearray(b"x") * (300 * 10**6); del held; import time; time.sleep(0.3); print("done")'
    run = run_measured([sys.executable, "-c", code])
    assert run.stdout == "done\n"
    assert 300 * MB < run.peak_bytes < 360 * MB
    assert 0.3 < run.seconds < 30


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_children_count_with_what_is_their_own() -> None:
    """Both hold the parent's 300 MB, of which there is one copy; the child's 200 MB are its own."""
    assert 500 * MB < run_measured([sys.executable, "-c", FORKS]).peak_bytes < 580 * MB


def test_a_failed_command_says_why() -> None:
    with pytest.raises(CommandError, match="no such luck"):
        run_measured([sys.executable, "-c", 'raise SystemExit("no such luck")'])
