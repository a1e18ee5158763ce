"""Verification: every claim of a manifest checked against the files and against the source."""

from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import ValidationError

from mkaq.calibrate.text import documents
from mkaq.calibrate.tokenizer import load_tokenizer
from mkaq.calibrate.tokens import calibration_tokens, tokens_digest
from mkaq.checkpoint.reader import Checkpoint
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.errors import MkaqError, ResourceError, VerificationError
from mkaq.export.formats import EXPORTS
from mkaq.fit.hold_out import calibration_samples
from mkaq.formats.formats import format_of
from mkaq.generate.stream import stream
from mkaq.manifest import MANIFEST, Manifest, read_manifest
from mkaq.pipeline import stage_of
from mkaq.progress import Progress
from mkaq.ranks import ALONE
from mkaq.run.quality import fallbacks_of
from mkaq.stages.calibrate import CalibrationSection
from mkaq.stages.export import ExportSection, settings_of
from mkaq.stages.quantize import QuantizeRecord
from mkaq.verify.case import Case, raise_faults
from mkaq.verify.files import check_files
from mkaq.verify.remeasure import tolerance
from mkaq.walk.device import compute_dtype
from mkaq.walk.walk import LayerWalk
from mkaq.walk.whole_model import whole_model


def verify(artifact: Path, source: Path | None, device: torch.device, progress: Progress) -> list[str]:
    """Verifies an artifact.

    Args:
        artifact: Its folder.
        source: Folder of the source model, to recompute the merge; None skips that.
        device: The device that runs the model.
        progress: Progress output.

    Returns:
        One sentence for each check.

    Raises:
        VerificationError: With every file or claim that does not hold.
    """
    manifest = read_manifest(artifact)
    checks = ["the manifest is whole"]
    raise_faults(artifact, check_files(artifact, manifest.files, beside=MANIFEST))
    checks.append(f"{len(manifest.files)} files have their sizes and digests")
    try:
        checkpoint = open_checkpoint(artifact, quantized=True)
    except MkaqError as error:
        raise VerificationError(error.what, where=error.where) from None
    checks.append(
        f"{len(checkpoint.tensors)} tensors are all that config.json implies, with the right shapes"
    )
    raise_faults(artifact, [*_size_claims(manifest, checkpoint), *_budget_claims(manifest)])
    if manifest.fallbacks != fallbacks_of(manifest.steps):
        raise_faults(artifact, ["the fallbacks of the manifest are not those of its steps"])
    checks.append("layers, parameters, bytes and fallbacks are as the manifest says")
    raise_faults(artifact, list(_export_claims(manifest, checkpoint)))
    checks += [f"{each.format} holds the same codes and weights, bit for bit" for each in manifest.exports]
    checks.append(_check_runs(checkpoint, device))
    if source is not None:
        original = open_checkpoint(source)
        raise_faults(source, check_files(source, manifest.source.files))
        raise_faults(artifact, list(_source_claims(manifest, original)))
        checks.append(f"{len(manifest.source.files)} files of the source have their digests")
        checks += _check_against(manifest, checkpoint, original, device, progress)
    return checks


def _size_claims(manifest: Manifest, checkpoint: Checkpoint) -> Iterator[str]:
    before = (manifest.source.layers, manifest.source.parameters, manifest.source.bytes)
    for step in manifest.steps:
        if (step.layers_before, step.parameters_before, step.bytes_before) != before:
            yield f"step {step.step} does not begin where the one before it ended"
        before = (step.layers_after, step.parameters_after, step.bytes_after)
    actual = (checkpoint.num_layers, checkpoint.parameters, checkpoint.nbytes)
    if before != actual:
        yield f"layers, parameters, bytes: the manifest ends with {before}, the model has {actual}"
    quantized = next((step for step in manifest.steps if isinstance(step, QuantizeRecord)), None)
    config = checkpoint.quantization or {}
    bits = format_of(checkpoint.quantization).bits(config)
    claimed = (quantized.method, quantized.bits) if quantized else (None, None)
    if claimed != (config.get("quant_method"), bits):
        yield f"the manifest says quantization {claimed}, config.json {(config.get('quant_method'), bits)}"
    if quantized and {module.name for module in quantized.modules} != set(checkpoint.quantized_linears):
        yield "the quantized modules are not those of the model"


def _export_claims(manifest: Manifest, checkpoint: Checkpoint) -> Iterator[str]:
    try:
        section = ExportSection.model_validate(manifest.recipe.get("export"))
    except ValidationError:
        where = checkpoint.path / MANIFEST
        raise VerificationError("recipe.export cannot be read", where=where) from None
    if [each.format for each in manifest.exports] != section.others:
        yield f"the recipe has the formats {section.formats}, the manifest has others"
    settings = settings_of(manifest)
    for name in section.others:
        folder = checkpoint.path / name
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        recorded = [each.bytes for each in manifest.exports if each.format == name]
        if [size] != recorded:
            yield f"{name} has {size} bytes, the manifest says {recorded}"
        if reason := EXPORTS[name].refusal(checkpoint, checkpoint.quantization):
            yield f"{name} cannot hold this model: {reason}"
            continue
        faults = EXPORTS[name].check(checkpoint, folder, settings)
        yield from (f"{name}: {fault}" for fault in faults)


def _budget_claims(manifest: Manifest) -> Iterator[str]:
    """Yields a fault if the steps differ from the choice of the budget."""
    if manifest.budget is None or not manifest.steps:
        return
    merged = next((step for step in manifest.steps if step.step == "merge"), None)
    quantized = next((step for step in manifest.steps if isinstance(step, QuantizeRecord)), None)
    removed = merged.layers_before - merged.layers_after if merged else 0
    bits = quantized.bits if quantized and quantized.method == "gptq" else None
    chosen = manifest.budget.chosen
    if (chosen.removed, chosen.bits) != (removed, bits):
        choice = f"the budget chose {chosen.removed} layers and {chosen.bits} bits"
        yield f"{choice}, the steps have {removed} and {bits}"


def _source_claims(manifest: Manifest, source: Checkpoint) -> Iterator[str]:
    recorded = manifest.source
    claims = (recorded.model_type, recorded.layers, recorded.parameters, recorded.bytes)
    actual = (source.config["model_type"], source.num_layers, source.parameters, source.nbytes)
    if claims != actual:
        yield f"family, layers, parameters, bytes of the source: the manifest says {claims}, it has {actual}"


def _check_against(
    manifest: Manifest, artifact: Checkpoint, source: Checkpoint, device: torch.device, progress: Progress
) -> list[str]:
    """Recomputes what follows from the source, bit for bit, and measures recorded errors again.

    Choices based on measured errors are not repeated.

    Returns:
        One sentence for each check.

    Raises:
        VerificationError: With every claim that does not hold.
    """
    case = Case(artifact, source)
    measured = list[str]()
    for step in manifest.steps:
        before = case.measure
        stage_of(step.step).check(step, case)
        measured += [step.step] * (case.measure is not None and case.measure is not before)
    checks = case.compare(progress)
    if case.measure is None:
        return checks
    *changed, _ = measured
    if changed:
        later = "not measured again: the weights were changed afterwards"
        checks.append(f"errors that {' and '.join(changed)} recorded {later}")
    section = _calibration(manifest)
    tokens = _calibration_again(manifest, section, source)
    if tokens is None:
        return [*checks, "errors of hidden states not measured again: the calibration text is not here"]
    dtype, last = compute_dtype(source.dtype, device), manifest.steps[-1].step
    samples = calibration_samples(ALONE, tokens, section.seed).held_out_only()
    ran_on = manifest.ran_on.get("residuals") or manifest.ran_on.get(last)
    allowed = tolerance(ran_on.compute_dtype if ran_on else None, dtype)
    walks = LayerWalk(source, device, dtype), LayerWalk(artifact, device, dtype)
    raise_faults(artifact.path, list(case.measure(*walks, samples, allowed)))
    said = f"the weights leave the errors of hidden states that the manifest says ({last}; {allowed})"
    return [*checks, case.said or said]


def _calibration(manifest: Manifest) -> CalibrationSection:
    """The calibration of the recipe."""
    try:
        return CalibrationSection.model_validate(manifest.recipe.get("calibration"))
    except ValidationError:
        raise VerificationError("the recipe in the manifest has no calibration", where=MANIFEST) from None


def _calibration_again(
    manifest: Manifest, section: CalibrationSection, source: Checkpoint
) -> torch.Tensor | None:
    """The calibration tokens of the run, or None if the text is missing or has changed."""
    try:
        texts = documents(section.dataset, section.path, "calibrate")
        size = section.num_samples, section.max_seq_length
        tokens = calibration_tokens(texts, load_tokenizer(source.path), *size, section.seed)
    except MkaqError:
        return None
    claim = manifest.calibration
    return tokens if claim and tokens_digest(tokens) == claim.tokens_sha256 else None


def _check_runs(checkpoint: Checkpoint, device: torch.device) -> str:
    """Runs the model: generates text if it fits into memory, else walks it once."""
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
    return f"the model loads and generates ({len(list(stream(model, prompt, 8, set())))} tokens)"
