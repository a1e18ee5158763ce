"""Verification: every claim of a manifest checked against the files, and against the source."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from mkaq.errors import MkaqError, ResourceError, VerificationError
from mkaq.export.manifest import MANIFEST, FileEntry, Manifest, MergeStep, QuantizeStep, read_manifest
from mkaq.handoff import sha256_file
from mkaq.merge.plan import MergePlan
from mkaq.merge.stage import digest_layer, merged_layers
from mkaq.model.checkpoint import Checkpoint, open_checkpoint
from mkaq.model.load import generate, whole_model
from mkaq.model.walk import LayerWalk, compute_dtype, dense_layer
from mkaq.progress import Progress
from mkaq.quantize.gptq_stage import relative_error

_TOLERANCE = 1e-6


def verify(artifact: Path, source: Path | None, device: torch.device, progress: Progress) -> list[str]:
    """Checks an artifact.

    Args:
        artifact: Its folder.
        source: The folder of the model that it was made from, to recompute the merge.
        device: Where the model is run.
        progress: Told what happens.

    Returns:
        What was checked, a sentence for each.

    Raises:
        VerificationError: With every file or claim that does not hold.
    """
    manifest = read_manifest(artifact)
    done = ["the manifest is whole"]
    _raise(artifact, check_files(artifact, manifest.files, strict=True))
    done.append(f"{len(manifest.files)} files have their sizes and digests")
    try:
        checkpoint = open_checkpoint(artifact, quantized=True)
    except MkaqError as error:
        raise VerificationError(error.what, where=error.where) from None
    done.append(f"{len(checkpoint.tensors)} tensors are all that config.json implies, with the right shapes")
    _raise(artifact, list(_size_claims(manifest, checkpoint)))
    done.append("layers, parameters and bytes are as the manifest says")
    done.append(_check_runs(checkpoint, device))
    if source is not None:
        original = open_checkpoint(source)
        _raise(source, check_files(source, manifest.source.files, strict=False))
        _raise(artifact, list(_source_claims(manifest, original)))
        done.append(f"{len(manifest.source.files)} files of the source have their digests")
        done += _check_against(manifest, checkpoint, original, progress)
    return done


def check_files(folder: Path, files: list[FileEntry], *, strict: bool) -> list[str]:
    """What is wrong with the files of a folder; `strict` also counts files that are not listed."""
    faults = []
    for entry in files:
        path = folder / entry.path
        if Path(entry.path).name != entry.path or not path.is_file():
            faults.append(f"{entry.path} is missing")
        elif path.stat().st_size != entry.bytes:
            faults.append(f"{entry.path} has {path.stat().st_size} bytes, not {entry.bytes}")
        elif sha256_file(path) != entry.sha256:
            faults.append(f"{entry.path} has changed: its sha256 is not the manifest's")
    if strict:
        listed = {entry.path for entry in files} | {MANIFEST}
        extra = sorted(
            p.name for p in folder.iterdir() if p.name not in listed and not p.name.startswith(".")
        )
        faults += [f"{name} is not in the manifest" for name in extra]
    return faults


def _raise(where: Path, faults: list[str]) -> None:
    if faults:
        raise VerificationError("; ".join(faults), where=where, fix="make or download it again")


def _size_claims(manifest: Manifest, checkpoint: Checkpoint) -> Iterator[str]:
    before = (manifest.source.layers, manifest.source.parameters, manifest.source.bytes)
    for step in manifest.steps:
        if (step.layers_before, step.parameters_before, step.bytes_before) != before:
            yield f"step {step.step} does not begin where the one before it ended"
        before = (step.layers_after, step.parameters_after, step.bytes_after)
    found = (checkpoint.num_layers, checkpoint.parameters, checkpoint.nbytes)
    if before != found:
        yield f"layers, parameters, bytes: the manifest ends with {before}, the model has {found}"
    quantized = next((step for step in manifest.steps if isinstance(step, QuantizeStep)), None)
    config = checkpoint.quantization or {}
    bits = config.get("bits") or {True: 8, None: None, False: 4}[config.get("load_in_8bit")]
    claimed = (quantized.method, quantized.bits) if quantized else (None, None)
    if claimed != (config.get("quant_method"), bits):
        yield f"the manifest says quantization {claimed}, config.json {(config.get('quant_method'), bits)}"
    if quantized:
        expected = {
            f"model.layers.{i}.{n}"
            for i in range(checkpoint.num_layers)
            for n in checkpoint.family.linear_names
        }
        if {module.name for module in quantized.modules} != expected:
            yield "the quantized modules are not those of the model"


def _source_claims(manifest: Manifest, source: Checkpoint) -> Iterator[str]:
    told = manifest.source
    claims = (told.model_type, told.layers, told.parameters, told.bytes)
    found = (source.config["model_type"], source.num_layers, source.parameters, source.nbytes)
    if claims != found:
        yield f"family, layers, parameters, bytes of the source: the manifest says {claims}, it has {found}"


def _check_runs(checkpoint: Checkpoint, device: torch.device) -> str:
    """Runs the model: generation if it fits into memory, else one walk."""
    dtype = compute_dtype(checkpoint, device)
    prompt = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], device=device) % checkpoint.hf_config.vocab_size
    try:
        model = whole_model(checkpoint, device, dtype)
    except ResourceError:
        walk = LayerWalk(checkpoint, device, dtype)
        *_, (_, hidden_states) = walk.hidden_states(prompt)
        if not bool(torch.isfinite(hidden_states).all()):
            raise VerificationError("the model gives NaN", where=checkpoint.path) from None
        return "the model runs, layer by layer (too large for memory here)"
    if not bool(torch.isfinite(model(input_ids=prompt).logits).all()):
        raise VerificationError("the model gives NaN", where=checkpoint.path)
    return f"the model loads and generates ({len(generate(model, prompt, 8, set()))} tokens)"


def _check_against(
    manifest: Manifest, artifact: Checkpoint, source: Checkpoint, progress: Progress
) -> list[str]:
    merge_step = next((step for step in manifest.steps if isinstance(step, MergeStep)), None)
    quantize_step = next((step for step in manifest.steps if isinstance(step, QuantizeStep)), None)
    dtype = getattr(torch, merge_step.dtype) if merge_step else artifact.dtype
    if merge_step:
        plan = MergePlan(
            (), tuple({int(old): w for old, w in layer.from_.items()} for layer in merge_step.layers)
        )
        _raise(artifact.path, list(_plan_faults(merge_step, source.num_layers)))
    else:
        plan = MergePlan((), tuple({index: 1.0} for index in range(source.num_layers)))
    faults: list[str] = []
    for name, tensor in source.each(source.outer_tensor_names):
        if not torch.equal(tensor.to(dtype), artifact.read([name])[name]):
            faults.append(f"{name} is not the source's")
    errors = {module.name: module.weight_error for module in quantize_step.modules} if quantize_step else {}
    layers = progress.track(merged_layers(source, plan, dtype), "verify", len(plan.layers))
    for new, tensors in enumerate(layers):
        prefix = f"model.layers.{new}."
        if merge_step and digest_layer(tensors) != merge_step.layers[new].sha256:
            faults.append(f"layer {new} merged again has another digest")
        stored = artifact.read(artifact.layer_tensor_names(new))
        present = dense_layer({k.removeprefix(prefix): v for k, v in stored.items()}, artifact.quantization)
        for name, tensor in tensors.items():
            module = prefix + name.removesuffix(".weight")
            if module in errors and name.endswith(".weight"):
                actual = relative_error(tensor, present[name])
                if not math.isclose(actual, errors[module], rel_tol=_TOLERANCE, abs_tol=1e-12):
                    faults.append(
                        f"{module} has a weight error of {actual:.6g}, the manifest says {errors[module]:.6g}"
                    )
            elif not torch.equal(tensor, present[name]):
                faults.append(f"{prefix}{name} is not what the recorded merge gives")
    _raise(artifact.path, faults)
    told = [f"{len(plan.layers)} layers recomputed from the source, bit for bit"] if merge_step else []
    if quantize_step:
        told.append(f"{len(errors)} quantized modules have the weight error that the manifest says")
    return told


def _plan_faults(step: MergeStep, num_layers: int) -> Iterator[str]:
    """Whether the weights of the new layers follow from the recorded merges."""
    groups: dict[int, dict[int, float]] = {index: {index: 1.0} for index in range(num_layers)}
    for merge in step.merges:
        if merge.into not in groups or merge.from_ not in groups:
            yield f"the merge of {merge.from_} into {merge.into} names a layer that is gone"
            return
        later = groups.pop(merge.from_)
        weights = {index: weight * merge.coefficient for index, weight in groups[merge.into].items()}
        groups[merge.into] = weights | {
            index: weight * (1 - merge.coefficient) for index, weight in later.items()
        }
    recorded = [{int(old): weight for old, weight in layer.from_.items()} for layer in step.layers]
    if [layer.new for layer in step.layers] != list(range(len(step.layers))):
        yield "the new layers are not numbered from 0"
    if recorded != [groups[index] for index in sorted(groups)]:
        yield "the weights of the new layers do not follow from the recorded merges"
