"""Two runs of one recipe, on two devices: how far their results are from each other."""

import json
from pathlib import Path
from typing import Any

import torch

from mkaq.calibrate.text import documents
from mkaq.calibrate.tokenizer import load_tokenizer
from mkaq.calibrate.tokens import evaluation_sequences
from mkaq.checkpoint.reader import Checkpoint
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.errors import MkaqError
from mkaq.fit.hold_out import token_weights
from mkaq.formats.layer import dense_layer
from mkaq.formats.packing import unpack
from mkaq.progress import Progress
from mkaq.run.job import RECORD
from mkaq.verification import verify
from mkaq.walk.walk import LayerWalk

CPU = torch.device("cpu")


def compare(first: Path, second: Path) -> dict[str, Any]:
    """What differs between two runs.

    Args:
        first: Folder of the one on the device.
        second: Of the one on the CPU.

    Returns:
        `groups_same` (None without a merge), `perplexity` and `perplexity_ratio` by stage, `codes_equal`
        (None without codes), `weight_difference` and `hidden_difference` of the artifacts as shares of
        their energies, and the mean recorded `errors` of each stage.
    """
    models = [open_checkpoint(run / "artifact", quantized=True) for run in (first, second)]
    perplexity = {stage: [value, measured(second)[stage]] for stage, value in measured(first).items()}
    plans = [groups(run) for run in (first, second)]
    return {
        "groups_same": None if plans[0] is None else plans[0] == plans[1],
        "groups": plans,
        "perplexity": perplexity,
        "perplexity_ratio": {stage: own / other for stage, (own, other) in perplexity.items()},
        "codes_equal": codes_equal(*models),
        "weight_difference": weight_difference(*models),
        "hidden_difference": hidden_difference(*models),
        "errors": {stage: [value, errors(second)[stage]] for stage, value in errors(first).items()},
    }


def groups(run: Path) -> list[list[int]] | None:
    """The layers of the source that each new layer stands for."""
    record = record_of(run, "merge")
    return record and [sorted(map(int, layer["from"])) for layer in record["layers"]]


def record_of(run: Path, stage: str) -> dict[str, Any] | None:
    """What a stage did, as the manifest has it; None if the run has no such stage."""
    file = run / stage / RECORD
    return json.loads(file.read_text()) if file.is_file() else None


def measured(run: Path) -> dict[str, float]:
    """The perplexity of every stage."""
    files = sorted((run / "evaluate").glob("*/evaluation.json"))
    order = ("source", "merge", "recover", "quantize")
    found = {file.parent.name: json.loads(file.read_text())["perplexity"]["perplexity"] for file in files}
    return {stage: found[stage] for stage in order if stage in found}


def errors(run: Path) -> dict[str, float]:
    """Means of the errors that a run records: of hidden states, and of what linear layers give."""
    found: dict[str, list[float]] = {}
    if record := record_of(run, "merge"):
        found["merge"] = [layer["fused"]["residual"] for layer in record["layers"] if layer["fused"]]
    if record := record_of(run, "recover"):
        found["recover"] = [layer["error"] for layer in record["layers"]]
    if record := record_of(run, "quantize"):
        told = [(module["error"], module["weight_error"]) for module in record["modules"]]
        found["quantize"] = [of_weight if error is None else error for error, of_weight in told]
    return {stage: sum(values) / len(values) for stage, values in found.items() if values}


def codes_equal(first: Checkpoint, second: Checkpoint) -> float | None:
    """The share of the codes of all quantized weights that are equal."""
    equal = count = 0
    for name in first.tensors:
        pair = [model.read([name])[name] for model in (first, second)]
        if name.endswith(".qweight"):
            bits = (first.quantization or {})["bits"]
            pair = [unpack(words, bits) for words in pair]
        elif pair[0].dtype == torch.uint8 and name.endswith("proj.weight"):
            pair = [torch.stack([bytes_ >> 4, bytes_ & 15]) for bytes_ in pair]
        elif pair[0].dtype != torch.int8:
            continue
        equal, count = equal + int((pair[0] == pair[1]).sum()), count + pair[0].numel()
    return equal / count if count else None


def weight_difference(first: Checkpoint, second: Checkpoint) -> float:
    """|A - B|^2 / |B|^2 over the weights of all layers, made dense."""
    total = whole = 0.0
    for index in range(second.num_layers):
        pair = [dense_of(model, index) for model in (first, second)]
        for name, tensor in pair[1].items():
            total += float((pair[0][name].double() - tensor.double()).square().sum())
            whole += float(tensor.double().square().sum())
    return total / whole


def dense_of(model: Checkpoint, index: int) -> dict[str, torch.Tensor]:
    """The tensors of a layer by their names below it, its weights made dense."""
    return dense_layer(model.read_layer(index), model.arch.linear_names, model.quantization)


def hidden_difference(first: Checkpoint, second: Checkpoint) -> float:
    """Mean over tokens of |a - b|^2 / |b|^2 of the last hidden states, both computed on the CPU."""
    texts = documents("builtin", None, "evaluate")
    sequences = evaluation_sequences(texts, load_tokenizer(second.path), 32, 4)
    walks = [LayerWalk(model, CPU).hidden_states(torch.tensor(sequences)) for model in (first, second)]
    (*_, (_, own)), (*_, (_, other)) = walks
    return float(((own - other).square().mean(-1) * token_weights(other)).mean())


def verified(artifact: Path, source: Path | None, device: torch.device) -> dict[str, Any]:
    """What `mkaq verify` says: its exit code, and the checks or the fault."""
    try:
        return {"exit": 0, "told": verify(artifact, source, device, Progress(quiet=True))}
    except MkaqError as error:
        return {"exit": error.exit_code, "told": [str(error)[:1000]]}


def stage_rows(run: Path) -> list[dict[str, Any]]:
    """Seconds and the most memory of every stage of a run, and what the plan expects on the device."""
    log = json.loads((run / "run.json").read_text())
    return [
        {
            "stage": row["stage"],
            "seconds": row["seconds"],
            "peak_host_bytes": row["peak_memory_bytes"],
            "peak_device_bytes": row.get("peak_device_bytes"),
            "expected_bytes": log["expected_memory_by_stage"].get(row["stage"].partition("/")[0]),
        }
        for row in log["stages"]
    ]
