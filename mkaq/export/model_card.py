"""README.md of the artifact: a model card that hubs understand and a person can read."""

import yaml

from mkaq.export.manifest import Manifest, MergeStep, QuantizeStep, RecoverStep

_LOAD = {
    "gptq": "needs `pip install optimum gptqmodel`",
    "bitsandbytes": "needs `pip install bitsandbytes accelerate`",
}


def model_card(manifest: Manifest) -> str:
    """The card, the same for the same manifest."""
    quantized = next((step for step in manifest.steps if isinstance(step, QuantizeStep)), None)
    front = {
        "base_model": manifest.source.path,
        "base_model_relation": "quantized" if quantized else "merge",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mkaq"] + [step.method for step in manifest.steps],
    }
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {manifest.name}", ""]
    lines += [f"Made from `{manifest.source.path}` by mkaq {manifest.mkaq_version}.", ""]
    lines += ["| stage | layers | parameters | bytes of weights | perplexity |", "|---|---|---|---|---|"]
    source = manifest.source
    rows = [("source", source.layers, source.parameters, source.bytes)]
    rows += [
        (step.step, step.layers_after, step.parameters_after, step.bytes_after) for step in manifest.steps
    ]
    for stage, layers, parameters, size in rows:
        measured = manifest.evaluation.get(stage, {}).get("perplexity", {}).get("perplexity")
        lines.append(
            f"| {stage} | {layers} | {parameters:,} | {size:,} | {f'{measured:.2f}' if measured else '-'} |"
        )
    for step in manifest.steps:
        lines += ["", _describe(step)]
    load = f" ({_LOAD[quantized.method]})" if quantized else ""
    lines += ["", f"Load it with plain transformers{load}:", "", "```python"]
    lines += ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += ['model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")']
    lines += ['tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")', "```", ""]
    lines += ["`mkaq-manifest.json` records every step; `mkaq verify` checks it.", ""]
    return "\n".join(lines)


def _describe(step: MergeStep | RecoverStep | QuantizeStep) -> str:
    if isinstance(step, RecoverStep):
        steps = step.settings["steps"]
        return f"Every layer tuned alone toward the hidden states of the original ({steps} steps)."
    if isinstance(step, MergeStep):
        groups = [", ".join(layer.from_) for layer in step.layers if len(layer.from_) > 1]
        how = "fused in function space" if step.layers[0].fused else "averaged"
        return (
            f"Merged (MKA, arXiv 2406.16330; {how}) from {step.layers_before} to {step.layers_after} layers: "
            + "; ".join(groups)
            + "."
        )
    settings = {
        key: value
        for key, value in step.settings.items()
        if key not in ("method", "bits") and value is not None
    }
    told = ", ".join(f"{key} {value}" for key, value in settings.items())
    return f"Quantized with {step.method} to {step.bits} bits ({told})."
