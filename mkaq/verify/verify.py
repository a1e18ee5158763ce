"""Verification: every claim of a manifest checked against the files, and against the source."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

from mkaq.checkpoint.reader import Checkpoint
from mkaq.checkpoint.side_files import stays_inside
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.digests import sha256_file
from mkaq.errors import MkaqError, ResourceError, VerificationError
from mkaq.export.manifest import MANIFEST, FileEntry, Manifest, QuantizeStep, read_manifest
from mkaq.formats.formats import format_of
from mkaq.progress import Progress
from mkaq.verify.against import check_against, raise_faults
from mkaq.walk.device import compute_dtype
from mkaq.walk.walk import LayerWalk
from mkaq.walk.whole_model import generate, whole_model


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
    raise_faults(artifact, check_files(artifact, manifest.files, strict=True))
    done.append(f"{len(manifest.files)} files have their sizes and digests")
    try:
        checkpoint = open_checkpoint(artifact, quantized=True)
    except MkaqError as error:
        raise VerificationError(error.what, where=error.where) from None
    done.append(f"{len(checkpoint.tensors)} tensors are all that config.json implies, with the right shapes")
    raise_faults(artifact, [*_size_claims(manifest, checkpoint), *_budget_claims(manifest)])
    done.append("layers, parameters and bytes are as the manifest says")
    done.append(_check_runs(checkpoint, device))
    if source is not None:
        original = open_checkpoint(source)
        raise_faults(source, check_files(source, manifest.source.files, strict=False))
        raise_faults(artifact, list(_source_claims(manifest, original)))
        done.append(f"{len(manifest.source.files)} files of the source have their digests")
        done += check_against(manifest, checkpoint, original, device, progress)
    return done


def check_files(folder: Path, files: list[FileEntry], *, strict: bool) -> list[str]:
    """What is wrong with the files of a folder; `strict` also counts files that are not listed."""
    faults = []
    for entry in files:
        path = folder / entry.path
        if not stays_inside(folder, entry.path):
            faults.append(f"{entry.path!r} leaves the folder")
        elif not path.is_file():
            faults.append(f"{entry.path} is missing")
        elif path.stat().st_size != entry.bytes:
            faults.append(f"{entry.path} has {path.stat().st_size} bytes, not {entry.bytes}")
        elif sha256_file(path) != entry.sha256:
            faults.append(f"{entry.path} has changed: its sha256 is not the manifest's")
    if strict:
        listed = {entry.path for entry in files} | {MANIFEST}
        faults += [f"{name} is not in the manifest" for name in _not_listed(folder, listed)]
    return faults


def _not_listed(folder: Path, listed: set[str]) -> list[str]:
    """What lies in a folder and is not listed; hidden files are left alone, but for those further below."""
    above = {str(parent) for name in listed for parent in PurePosixPath(name).parents}
    extra = []
    for path in sorted(folder.iterdir()):
        if path.name in above and path.is_dir():
            below = (p.relative_to(folder).as_posix() for p in sorted(path.rglob("*")))
            extra += [name for name in below if name not in listed and name not in above]
        elif path.name not in listed and not path.name.startswith("."):
            extra.append(path.name)
    return extra


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
    bits = format_of(checkpoint.quantization).bits(config)
    claimed = (quantized.method, quantized.bits) if quantized else (None, None)
    if claimed != (config.get("quant_method"), bits):
        yield f"the manifest says quantization {claimed}, config.json {(config.get('quant_method'), bits)}"
    if quantized:
        expected = {
            checkpoint.arch.in_layer(index, name)
            for index in range(checkpoint.num_layers)
            for name in checkpoint.arch.linear_names
        }
        if {module.name for module in quantized.modules} != expected:
            yield "the quantized modules are not those of the model"


def _budget_claims(manifest: Manifest) -> Iterator[str]:
    """Whether what a budget chose is what was done."""
    if manifest.budget is None or not manifest.steps:
        return
    merged = next((step for step in manifest.steps if step.step == "merge"), None)
    quantized = next((step for step in manifest.steps if step.step == "quantize"), None)
    removed = merged.layers_before - merged.layers_after if merged else 0
    bits = quantized.bits if quantized and quantized.method == "gptq" else None
    chosen = manifest.budget.chosen
    if (chosen.removed, chosen.bits) != (removed, bits):
        told = f"the budget chose {chosen.removed} layers and {chosen.bits} bits"
        yield f"{told}, the steps have {removed} and {bits}"


def _source_claims(manifest: Manifest, source: Checkpoint) -> Iterator[str]:
    told = manifest.source
    claims = (told.model_type, told.layers, told.parameters, told.bytes)
    found = (source.config["model_type"], source.num_layers, source.parameters, source.nbytes)
    if claims != found:
        yield f"family, layers, parameters, bytes of the source: the manifest says {claims}, it has {found}"


def _check_runs(checkpoint: Checkpoint, device: torch.device) -> str:
    """Runs the model: generation if it fits into memory, else one walk."""
    dtype = compute_dtype(checkpoint.dtype, device)
    prompt = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], device=device) % checkpoint.sizes.vocabulary
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
