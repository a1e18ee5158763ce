"""Small valid files of every kind that is fuzzed: what a fuzzer begins with, and readers compare with."""

import gzip
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import yaml
from safetensors.numpy import save

from mkaq.checkpoint.reader import INDEX
from mkaq.export.gguf_tensors import Planned
from mkaq.formats.gguf_types import Type
from mkaq.formats.gptq import quantization_config
from mkaq.manifest import MANIFEST
from mkaq.merge.origins import ORIGINS as ORIGINS_FILE
from mkaq.run.publish import HANDOFF
from tests.fuzz.mutate import sign
from tests.runs import ROOT, run_quietly
from tests.tiny import CHANNELS, PROTECT, make_model, write_recipe, write_text

LAYERS = 3
SETTING = b"--set "
RECIPES = [
    yaml.safe_dump(yaml.safe_load(path.read_text()), default_flow_style=True).encode()
    for path in sorted((ROOT / "recipes").glob("*.yaml"))
]
PLAIN = b"{version: 1, name: x, model: {path: m}, merge: {layers: 1}, quantize: {method: bitsandbytes}}"
SETTINGS = ["merge.ratio=0.25", "quantize=null", "evaluate.perplexity={dataset: builtin}", "model.path=a"]
ORIGINS = [{"heads": {"0": [0]}, "channels": {"0": list(range(32))}}] * LAYERS
_SHAPE = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}


def model(folder: Path) -> Path:
    """A model of a few KB in several shards."""
    if not (folder / "model").exists():
        make_model(folder / "model", layers=LAYERS, num_key_value_heads=1, shard_size="16KB", **_SHAPE)
    return folder / "model"


def gguf_plan(folder: Path) -> tuple[dict[str, gguf.gguf_writer.GGUFValue], list[Planned]]:
    """Metadata of several types and two tensors, as an export plans them; written to whole.gguf too."""
    writer = gguf.GGUFWriter(folder / "whole.gguf", "llama")
    writer.add_name("a name")
    writer.add_block_count(2)
    writer.add_rope_freq_base(1e4)
    writer.add_bool("a.b", True)
    writer.add_token_list(["<s>", "a", "é"])
    writer.add_token_scores([0.5, 1.5, -2.0])
    writer.add_array("a.c", [1, -2, 3])
    rng = np.random.default_rng(0)
    data = [rng.integers(0, 99, size, np.uint8) for size in ((2, 128), (4, 36))]
    kinds = [(Type.F32, (2, 32)), (Type.Q4_0, (4, 64))]
    tensors = [
        Planned(f"{name}.weight", kind, shape, lambda raw=raw: raw)
        for name, (kind, shape), raw in zip("ab", kinds, data, strict=True)
    ]
    for tensor in tensors:
        raw = tensor.make()
        writer.add_tensor_info(tensor.name, raw.shape, raw.dtype, raw.nbytes, tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.make())
    writer.close()
    return writer.kv_data[0], tensors


def _runs(folder: Path, *chosen: int) -> Iterator[Path]:
    """Finished runs: 0 averaged and quantized, 1 fused and tuned, 2 only quantized, 3 with a budget."""
    source, words = make_model(folder / "source", layers=LAYERS), write_text(folder / "text.txt")
    gptq = {"method": "gptq", "bits": 4, "group_size": 32}
    fused = {"method": "layerwise", "steps": 2, "batch_size": 2, "learning_rate": 1e-3}
    sections: list[dict[str, Any]] = [
        {"quantize": gptq, "export": {"formats": ["safetensors", "gguf"]}},
        {"merge": CHANNELS, "recover": fused, "quantize": {**gptq, "target": "source"}, "evaluate": None},
        {"merge": None, "quantize": {"method": "bitsandbytes", "bits": 8}, "evaluate": None},
        {"merge": {**PROTECT}, "quantize": None, "budget": {"bytes": "1500KB"}},
    ]
    for number in chosen:
        recipe = write_recipe(folder / f"{number}.yaml", source, words, **sections[number])
        yield run_quietly(recipe, folder / str(number))


def _manifests(folder: Path) -> Iterator[bytes]:
    for run in _runs(folder, 0, 1, 2, 3):
        text = (run / "artifact" / MANIFEST).read_text()
        yield sign(json.loads(text.replace(str(folder), "runs")))


def _headers(folder: Path) -> Iterator[bytes]:
    ones = {"a": np.ones((2, 3), np.float16), "b": np.ones(1, np.int8), "c": np.ones((), np.float32)}
    yield save(ones, {"format": "pt"})
    info = {"dtype": "U8", "shape": [2, 0, 3], "data_offsets": [0, 0]}
    head = json.dumps({"__metadata__": {"format": "pt"}, "a": info, "b": {**info, "dtype": "F4"}}).encode()
    yield len(head).to_bytes(8, "little") + head


def _configs(folder: Path) -> Iterator[bytes]:
    plain = (model(folder) / "config.json").read_bytes()
    yield plain
    for family in ("qwen2", "gemma2", "phi3"):
        yield json.dumps({**json.loads(plain), "model_type": family}).encode()
    options = {"scattered": False, "static_groups": False, "damp_percent": 0.01}
    gptq = quantization_config(bits=4, group_size=32, sym=True, **options)
    for method in (gptq, {"quant_method": "bitsandbytes", "load_in_8bit": True}, _COMPRESSED):
        yield json.dumps({**json.loads(plain), "quantization_config": method}).encode()


_COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
            | {"group_size": 32, "dynamic": False, "actorder": None},
        }
    },
    "ignore": ["lm_head"],
}


def _texts(folder: Path) -> Iterator[bytes]:
    yield from (b"some words\r\n", b'{"text": "words"}\n\n{"text": "\\ud83d"}', b"\xef\xbb\xbfx")
    yield b'Which one?,a,"b, c",d,e,A\n'
    yield from (gzip.compress(b'{"text": "words"}', mtime=0), lzma.compress(b"words"))


SEEDS: dict[str, Callable[[Path], Iterator[bytes]]] = {
    "header": _headers,
    "index": lambda folder: iter([(model(folder) / INDEX).read_bytes()]),
    "recipe": lambda folder: iter([*RECIPES, *(SETTING + text.encode() for text in SETTINGS)]),
    "manifest": _manifests,
    "gguf": lambda folder: iter([bool(gguf_plan(folder)) and (folder / "whole.gguf").read_bytes()]),
    "config": _configs,
    "handoff": lambda folder: (
        path.read_bytes().replace(str(folder).encode(), b"runs")
        for run in _runs(folder, 0)
        for path in sorted(run.glob(f"store/*/{HANDOFF}"))
    ),
    "origins": lambda folder: (
        path.read_bytes() for run in _runs(folder, 1) for path in run.glob(f"artifact/{ORIGINS_FILE}")
    ),
    "text": _texts,
}
