"""Peak memory against depth: mkaq walks one layer at a time, so it hardly grows with the number of layers.

usage: python benchmarks/memory.py [--layers 8 16 32] [--hidden 1024]

For each depth a random Llama is written layer by layer, then three processes are measured side by
side: `mkaq run` (merge and 4-bit GPTQ), the same model merely loaded by transformers in float32, and
an interpreter that imports both libraries and does nothing. Results go to
benchmarks/results/memory.json and .md.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig

from mkaq.arch.families import arch_of
from mkaq.arch.skeleton import dense_tensors
from mkaq.checkpoint.resolve import BUILTIN
from mkaq.checkpoint.writer import ShardWriter
from mkaq.digests import library_versions
from mkaq.files import write_json

RESULTS = Path(__file__).parent / "results"
PEAK = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
LOAD = (
    "import sys, torch; from transformers import AutoModelForCausalLM;"
    "AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32);"
)
NOTHING = (
    "import torch, transformers, mkaq.plan, mkaq.merge.fused, mkaq.quantize.gptq_layers;"
    "import mkaq.quantize.each, mkaq.quantize.bnb, mkaq.recover.layerwise;"
    "from transformers import AutoModelForCausalLM; "
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--hidden", type=int, default=1024)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    nothing = measure(NOTHING)
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as scratch:
            model, out = Path(scratch, "model"), Path(scratch, "run")
            size = write_model(model, layers, options.hidden)
            recipe = {
                "version": 1,
                "name": "memory",
                "model": {"path": str(model)},
                "calibration": {"num_samples": 16, "max_seq_length": 512},
                "merge": {"ratio": 0.25},
                "quantize": {"method": "gptq", "bits": 4},
            }
            Path(scratch, "recipe.yaml").write_text(yaml.safe_dump(recipe))
            command = "from mkaq.cli import main; main()"
            arguments = ["run", str(Path(scratch, "recipe.yaml")), "--output", str(out)]
            subprocess.run([sys.executable, "-c", command, *arguments], check=True, stdout=subprocess.DEVNULL)
            log = json.loads((out / "run.json").read_text())
            row = {
                "layers": layers,
                "bytes": size,
                "mkaq": log["peak_memory_bytes"],
                "planned": log["expected_memory_bytes"],
            }
            row |= {"transformers": measure(LOAD, str(model)), "nothing": nothing}
            row["seconds"] = {stage["stage"]: stage["seconds"] for stage in log["stages"]}
        rows.append(row)
        print(row, flush=True)
    RESULTS.mkdir(exist_ok=True)
    record = {"rows": rows, "hidden": options.hidden, "libraries": library_versions()}
    (RESULTS / "memory.json").write_text(json.dumps(record, indent=2) + "\n")
    (RESULTS / "memory.md").write_text(table(rows))
    print(table(rows))


def write_model(folder: Path, layers: int, hidden: int) -> int:
    """A random Llama in bfloat16, one tensor in memory at a time."""
    folder.mkdir()
    config = LlamaConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, max_position_embeddings=2048,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder, 10**9) as writer:
        for name, shape in dense_tensors(config, arch_of(config.to_dict(), "benchmark")).items():
            tensor = (
                torch.ones(shape)
                if len(shape) == 1
                else torch.randn(shape, generator=generator) * shape[1] ** -0.5
            )
            writer.add(name, tensor.to(torch.bfloat16))
    write_json(folder / "config.json", config.to_dict())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BUILTIN["builtin:tiny-llama"] / name, folder / name)
    return writer.total_size


def measure(code: str, *arguments: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", code + PEAK, *arguments], check=True, capture_output=True, text=True
    )
    return int(done.stdout.strip().splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "`benchmarks/memory.py`: peak resident memory in GB of a whole `mkaq run` (merge 25 %, GPTQ 4 bits),",
        "of merely loading the same model in transformers (float32), and of importing the libraries.",
        "",
        "| layers | checkpoint | mkaq run | as planned | transformers load | imports |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row[key] / 1e9:.2f}" for key in ("bytes", "mkaq", "planned", "transformers", "nothing")]
        lines.append(f"| {row['layers']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
