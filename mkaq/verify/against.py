"""The claims of a manifest that the source can confirm: what every new layer was made of, and how well."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from pydantic import ValidationError

from mkaq.arch.arch import Arch
from mkaq.calibrate.text import documents
from mkaq.calibrate.tokenizer import load_tokenizer
from mkaq.calibrate.tokens import calibration_tokens, tokens_digest
from mkaq.checkpoint.reader import Checkpoint
from mkaq.errors import MkaqError, VerificationError
from mkaq.export.manifest import (
    MANIFEST,
    Manifest,
    MergeStep,
    Module,
    NewLayer,
    QuantizeStep,
    RecoverStep,
)
from mkaq.fit.final_norm import scaled_norm
from mkaq.fit.hold_out import learning_samples
from mkaq.formats.layer import dense_layer
from mkaq.merge.channels import known_tensors
from mkaq.merge.groups import MergePlan
from mkaq.merge.origins import ORIGINS, Origins, as_tensor, read_origins
from mkaq.merge.parts import attention_parts, mlp_parts
from mkaq.merge.stage import digest_layer, merged_layers
from mkaq.progress import Progress
from mkaq.quantize.error import relative_error
from mkaq.ranks import ALONE
from mkaq.recipe import CalibrationSection
from mkaq.verify.claims import origin_faults, plan_faults, recovery_faults, residual_faults, weights_of
from mkaq.verify.remeasure import measure_again, tolerance
from mkaq.walk.device import compute_dtype
from mkaq.walk.walk import LayerWalk

_SAME = 1e-6


def raise_faults(where: Path, faults: list[str]) -> None:
    """Raises a VerificationError that lists the faults, if there are any."""
    if faults:
        raise VerificationError("; ".join(faults), where=where, fix="make or download it again")


def check_against(
    manifest: Manifest, artifact: Checkpoint, source: Checkpoint, device: torch.device, progress: Progress
) -> list[str]:
    """Checks the steps of a manifest against the source.

    Averaged layers are recomputed whole. Of fused layers everything but the solved `o_proj` and
    `down_proj` follows from the source and the recorded origins; of quantized ones how far each weight is
    from what it should be. What does not follow has recorded errors, which are measured again where the
    calibration text is at hand. Choices made from such errors are not made again.

    Returns:
        What was checked, a sentence for each.

    Raises:
        VerificationError: With every claim that does not hold.
    """
    merge_step = next((step for step in manifest.steps if isinstance(step, MergeStep)), None)
    recover_step = next((step for step in manifest.steps if isinstance(step, RecoverStep)), None)
    quantize_step = next((step for step in manifest.steps if isinstance(step, QuantizeStep)), None)
    dtype = getattr(torch, merge_step.dtype) if merge_step else artifact.dtype
    scales = [s.final_norm.scale for s in (merge_step, recover_step, quantize_step) if s and s.final_norm]
    faults = list(_outer_faults(artifact, source, scales, dtype))
    origins = []
    if merge_step is not None:
        fused = any(layer.fused for layer in merge_step.layers)
        origins = read_origins(artifact.path / ORIGINS) if fused else []
        claims = origin_faults(merge_step, origins, source) if fused else plan_faults(merge_step, source)
        tuned = recovery_faults(merge_step, recover_step) if recover_step else ()
        raise_faults(artifact.path, [*claims, *tuned])
    solved = quantize_step is not None and quantize_step.settings.get("target") == "source"
    measured = bool(origins or recover_step or solved)
    if quantize_step:
        faults += residual_faults(quantize_step, measured)
    told: list[str] = []
    if recover_step is None:
        errors = {m.name: m for m in quantize_step.modules} if quantize_step else {}
        faults += [
            f"{name} is said to be solved, and writes no hidden state"
            for name, module in errors.items()
            if not _is_source(module) and not name.endswith(tuple(f".{n}" for n in source.arch.writers))
        ]
        count, checked = 0, 0
        layers = _known_layers(merge_step, origins, source, dtype)
        total = len(merge_step.layers) if merge_step else source.num_layers
        for new, (known, whole) in enumerate(progress.track(layers, "verify", total)):
            record = merge_step.layers[new] if merge_step else None
            faults += _layer_faults(artifact, new, known, whole, record, errors)
            count += 1
            checked += sum(
                n.endswith(".weight") and _is_source(errors.get(_module(source.arch, new, n))) for n in known
            )
        if merge_step:
            what = "layers" if not origins else "layers but for what was solved"
            told.append(f"{count} {what} recomputed from the source, bit for bit")
        if quantize_step:
            told.append(f"{checked} quantized modules have the weight error that the manifest says")
    raise_faults(artifact.path, faults)
    if measured:
        told.append(_measure_again(manifest, artifact, source, device))
    return told


def _measure_again(manifest: Manifest, artifact: Checkpoint, source: Checkpoint, device: torch.device) -> str:
    tokens = _calibration_again(manifest, source)
    if tokens is None:
        return "errors of hidden states not measured again: the calibration text is not here"
    dtype, last = compute_dtype(source.dtype, device), manifest.steps[-1].step
    samples = learning_samples(ALONE, tokens, manifest.recipe["calibration"]["seed"]).held()
    walks = LayerWalk(source, device, dtype), LayerWalk(artifact, device, dtype)
    raise_faults(artifact.path, measure_again(manifest, *walks, samples))
    near = tolerance(manifest, manifest.steps[-1], dtype)
    return f"the weights leave the errors of hidden states that the manifest says ({last}; {near})"


def _outer_faults(
    artifact: Checkpoint, source: Checkpoint, scales: list[float], dtype: torch.dtype
) -> Iterator[str]:
    """What is wrong with the tensors outside of the layers, given the factors of the final norm in turn."""
    for name, tensor in source.each(source.outer_tensor_names):
        expected = tensor
        for scale in scales if name == source.arch.final_norm_weight else ():
            expected = scaled_norm(expected, scale, source.arch.norm_offset, dtype)
        if not torch.equal(expected.to(dtype), artifact.read([name])[name]):
            yield f"{name} is not the source's" + (", rescaled" if expected is not tensor else "")


def _calibration_again(manifest: Manifest, source: Checkpoint) -> torch.Tensor | None:
    """The calibration tokens of the run, or None if the text is not here or is another one."""
    try:
        section = CalibrationSection.model_validate(manifest.recipe["calibration"])
    except (ValidationError, KeyError):
        raise VerificationError("the recipe in the manifest has no calibration", where=MANIFEST) from None
    try:
        texts, tokenizer = documents(section, "calibrate"), load_tokenizer(source.path)
        size = section.num_samples, section.max_seq_length
        tokens = calibration_tokens(texts, tokenizer, *size, section.seed)
    except MkaqError:
        return None
    claim = manifest.calibration
    return tokens if claim and tokens_digest(tokens) == claim.tokens_sha256 else None


def _known_layers(
    step: MergeStep | None,
    origins: list[Origins],
    source: Checkpoint,
    dtype: torch.dtype,
) -> Iterator[tuple[dict[str, torch.Tensor], bool]]:
    """For each new layer the tensors that follow from the source, and whether these are all."""
    if not origins:
        every = [{index: 1.0} for index in range(source.num_layers)]
        weights = [weights_of(layer) for layer in step.layers] if step else every
        for tensors in merged_layers(source, MergePlan((), tuple(weights)), dtype):
            yield tensors, True
        return
    assert step is not None
    arch, sizes = source.arch, source.sizes
    kinds = {"heads": attention_parts(arch, sizes), "channels": mlp_parts(arch, sizes)}
    for layer, origin in zip(step.layers, origins, strict=True):
        group = sorted(weights_of(layer))
        layers = [source.read_layer(index) for index in group]
        parts = []
        for name, kind in kinds.items():
            places = as_tensor(origin[name])
            places[:, 0] -= group[0]
            parts.append((kind, places))
        assert layer.fused is not None
        left = [fit.ridge is None for fit in (layer.fused.attention, layer.fused.mlp)]
        yield known_tensors(layers, parts, dtype, left), False


def _layer_faults(
    artifact: Checkpoint,
    new: int,
    known: Mapping[str, torch.Tensor],
    whole: bool,
    record: NewLayer | None,
    errors: Mapping[str, Module],
) -> Iterator[str]:
    """What is wrong with a layer of the artifact, given the tensors that it should have."""
    arch, stored = artifact.arch, artifact.read_layer(new)
    present = dense_layer(stored, arch.linear_names, artifact.quantization)
    if record and (whole or not errors):
        digest = digest_layer(known if whole else stored)
        if digest != record.sha256:
            yield f"layer {new} has another digest than the manifest says"
    for name, tensor in known.items():
        module = _module(arch, new, name)
        if module in errors and name.endswith(".weight"):
            told, actual = errors[module], relative_error(tensor, present[name])
            if _is_source(told) and not math.isclose(actual, told.weight_error, rel_tol=_SAME, abs_tol=1e-12):
                claimed = f"the manifest says {told.weight_error:.6g}"
                yield f"{module} has a weight error of {actual:.6g}, {claimed}"
        elif not torch.equal(tensor, present[name]):
            yield f"{arch.in_layer(new, name)} is not what the recorded merge gives"


def _is_source(module: Module | None) -> bool:
    """Whether the weight that was rounded is the merged model's own, not one solved anew."""
    return module is not None and module.ridge is None


def _module(arch: Arch, new: int, name: str) -> str:
    return arch.in_layer(new, name.removesuffix(".weight"))
