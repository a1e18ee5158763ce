"""README.md of the artifact: a model card for hubs and for people."""

from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import yaml

from mkaq.formats.formats import FORMATS
from mkaq.manifest import Manifest
from mkaq.pipeline import stage_of
from mkaq.run.quality import quality_lines
from mkaq.stages.quantize import QuantizeRecord
from mkaq.units import decimal


def model_card(manifest: Manifest) -> str:
    """The text of the card; it depends only on the manifest."""
    quantized = next((step for step in manifest.steps if isinstance(step, QuantizeRecord)), None)
    front: dict[str, Any] = {}
    if base := manifest.source.base_model:
        front |= {"base_model": base, "base_model_relation": "quantized" if quantized else "merge"}
    front |= {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mkaq"] + [step.method for step in manifest.steps],
    }
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {manifest.name}", ""]
    lines += [f"Made from {_origin(manifest)} by mkaq {manifest.mkaq_version}.", ""]
    if not base:
        lines += [
            "The hub id of the source is not known; `model.base_model` in the recipe names it here.",
            "",
        ]
    lines += ["| stage | layers | parameters | bytes of weights | perplexity |", "|---|---|---|---|---|"]
    source = manifest.source
    rows = [("source", source.layers, source.parameters, source.bytes)]
    rows += [
        (step.step, step.layers_after, step.parameters_after, step.bytes_after) for step in manifest.steps
    ]
    for stage, layers, parameters, size in rows:
        measured = manifest.evaluation.get(stage, {}).get("perplexity")
        perplexity = decimal(measured["perplexity"]) if measured else "-"
        lines.append(f"| {stage} | {layers} | {parameters:,} | {size:,} | {perplexity} |")
    for line in quality_lines(manifest.fallbacks, manifest.evaluation):
        lines += ["", f"**{line}**"]
    for step in manifest.steps:
        lines += ["", stage_of(step.step).describe(step).sentence]
    needs = FORMATS[quantized.method].NEEDS if quantized else ""
    load = f" (needs `{needs}`)" if needs else ""
    lines += ["", f"Load it with plain transformers{load}:", "", "```python"]
    lines += ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += ['model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")']
    lines += ['tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")', "```", ""]
    if uses := [use.format(name=manifest.name) for use in _uses(manifest)]:
        lines += ["The same codes and weights in other formats:", ""]
        lines += [*(f"- {use}" for use in uses), ""]
    lines += ["`mkaq-manifest.json` records every step; `mkaq verify` checks it.", ""]
    return "\n".join(lines)


_USES = {
    "gguf": "`gguf/{name}.gguf`, for llama.cpp: `llama-cli -m gguf/{name}.gguf`",
    "compressed-tensors": "`compressed-tensors/`, for transformers (needs `pip install compressed-tensors`)",
    "mlx": "`mlx/`, for MLX: `mlx_lm.generate --model mlx --prompt ...`",
}


def _uses(manifest: Manifest) -> Iterator[str]:
    return (use for name, use in _USES.items() if name in manifest.recipe["export"]["formats"])


def _origin(manifest: Manifest) -> str:
    """The name of the source without its local path, which is private."""
    source = manifest.source
    if source.base_model or source.path.startswith("builtin:"):
        return f"`{source.base_model or source.path}`"
    name = PurePath(source.path).name
    return f"a local model (`{name}`)" if name.strip(".~") else "a local model"
