"""Random checkpoints with the shapes, the configuration and the files of real models.

usage: python -m benchmarks.shapes llama3-8b OUT [--layers 32] [--seed 0]

Weights are bfloat16 of variance 1 / in_features, so that activations stay finite at any depth; norms
are ones. Values are tiled from one block of random numbers, each tensor from another place in it, so
that a checkpoint is written about as fast as the disk takes it. Files are cut as on the hub (5 GB).
The tokenizer is the built-in one: its ids are a subset of the vocabulary.
"""

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from mkaq.arch.families import arch_of
from mkaq.arch.skeleton import dense_tensors
from mkaq.checkpoint.layout import Layout, TensorSpec
from mkaq.checkpoint.reader import BLOCK
from mkaq.checkpoint.resolve import BUILTIN
from mkaq.checkpoint.writer import ShardWriter
from mkaq.files import write_json

SHARD_SIZE = 5 * 10**9
PERIOD = 16_777_259  # values of the block: a prime, so that no two rows of a matrix are alike
_LLAMA3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama3-8b": {
        **_LLAMA3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
    },
    "llama3-70b": {
        **_LLAMA3,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
    },
    "mistral-7b": {  # v0.3
        "architectures": ["MistralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 32768,
    },
    "qwen2.5-7b": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "initializer_range": 0.02,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=CONFIGS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    size = write_checkpoint(options.out, options.shape, options.layers, options.seed)
    print(f"{options.out}: {size / 1e9:.2f} GB")


def write_checkpoint(
    folder: Path, shape: str, layers: int | None = None, seed: int = 0, **changes: Any
) -> int:
    """Writes a random checkpoint.

    Args:
        folder: Where it goes; made if it is not there.
        shape: One of `CONFIGS`.
        layers: How many; as many as the model has if None.
        seed: Of the values.
        changes: Keys of config.json that differ from the real model's.

    Returns:
        Bytes of its tensors.
    """
    config = CONFIGS[shape] | ({} if layers is None else {"num_hidden_layers": layers}) | changes
    layout = layout_of(config)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(PERIOD, generator=generator)
    scaled: dict[int, torch.Tensor] = {}
    folder.mkdir(parents=True, exist_ok=True)
    with ShardWriter(folder, SHARD_SIZE, layout) as writer:
        for name, (dtype, size) in layout.items():
            if name.endswith("norm.weight"):
                writer.add(name, torch.ones(size, dtype=dtype))
                continue
            inputs = size[-1]
            if inputs not in scaled:
                scaled[inputs] = (values * inputs**-0.5).to(dtype)
            first = int(torch.randint(len(values), (), generator=generator))
            writer.put(name, _tiled(scaled[inputs], first, torch.Size(size).numel()))
    write_json(folder / "config.json", config)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BUILTIN["builtin:tiny-llama"] / file, folder / file)
    return writer.total_size


def layout_of(config: dict[str, Any]) -> Layout:
    """Every tensor that a configuration implies, in the model's own order."""
    shapes = dense_tensors(AutoConfig.for_model(**config), arch_of(config, "benchmark"))
    return {name: TensorSpec(torch.bfloat16, shape) for name, shape in shapes.items()}


def _tiled(values: torch.Tensor, first: int, count: int) -> Iterator[torch.Tensor]:
    """`count` values from number `first` on, round and round, in pieces."""
    while count:
        piece = values[first : first + min(count, BLOCK)]
        yield piece
        first, count = (first + len(piece)) % len(values), count - len(piece)


if __name__ == "__main__":
    main()
