"""The claims of a manifest that the source can confirm: what every new layer was made of, and how well."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from pydantic import ValidationError

from mkaq.calibrate.text import documents
from mkaq.calibrate.tokenizer import load_tokenizer
from mkaq.calibrate.tokens import calibration_tokens, tokens_digest
from mkaq.errors import MkaqError, VerificationError
from mkaq.export.manifest import (
    MANIFEST,
    Fused,
    Manifest,
    MergeStep,
    Module,
    NewLayer,
    QuantizeStep,
    RecoverStep,
)
from mkaq.handoff import digest_of
from mkaq.merge.final_norm import rescale, scaled_norm
from mkaq.merge.fuse import known_tensors
from mkaq.merge.hold_out import held_out_error, learning_samples
from mkaq.merge.origins import ORIGINS, Origins, as_tensor, read_origins
from mkaq.merge.parts import attention_parts, mlp_parts
from mkaq.merge.plan import MergePlan
from mkaq.merge.stage import Streams, digest_layer, fused_layers, merged_layers
from mkaq.model.architecture import FINAL_NORM
from mkaq.model.checkpoint import Checkpoint
from mkaq.model.walk import LayerWalk, compute_dtype, dense_layer
from mkaq.progress import Progress
from mkaq.quantize.error import relative_error
from mkaq.ranks import ALONE
from mkaq.recipe import Recipe

_SAME = 1e-6
_CLOSE = 0.02  # of an error: another machine sums in another order


def raise_faults(where: Path, faults: list[str]) -> None:
    """Raises a VerificationError that lists the faults, if there are any."""
    if faults:
        raise VerificationError("; ".join(faults), where=where, fix="make or download it again")


def check_against(
    manifest: Manifest, artifact: Checkpoint, source: Checkpoint, device: torch.device, progress: Progress
) -> list[str]:
    """Checks the steps of a manifest against the source.

    Averaged layers are recomputed whole. Of fused layers everything but the solved `o_proj` and
    `down_proj` follows from the source and the recorded origins. Where the calibration text is at hand,
    layers are fused again, and the error of the artifact's hidden states is measured if it is not
    quantized.

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
        claims = _origin_faults(merge_step, origins, source) if fused else _plan_faults(merge_step, source)
        tuned = _recovery_faults(merge_step, recover_step) if recover_step else ()
        raise_faults(artifact.path, [*claims, *tuned])
    told: list[str] = []
    if recover_step is None:
        errors = {m.name: m for m in quantize_step.modules} if quantize_step else {}
        faults += [
            f"{name} is said to be solved, and writes no hidden state"
            for name, module in errors.items()
            if not _is_source(module) and not name.endswith((".o_proj", ".down_proj"))
        ]
        count, checked = 0, 0
        layers = _known_layers(merge_step, origins, source, dtype)
        total = len(merge_step.layers) if merge_step else source.num_layers
        for new, (known, whole) in enumerate(progress.track(layers, "verify", total)):
            record = merge_step.layers[new] if merge_step else None
            faults += _layer_faults(artifact, new, known, whole, record, errors)
            count += 1
            checked += sum(n.endswith(".weight") and _is_source(errors.get(_module(new, n))) for n in known)
        if merge_step:
            what = "layers" if not origins else "layers but for what was solved"
            told.append(f"{count} {what} recomputed from the source, bit for bit")
        if quantize_step:
            told.append(f"{checked} quantized modules have the weight error that the manifest says")
    raise_faults(artifact.path, faults)
    if merge_step and (origins or recover_step):
        tokens = _calibration_again(manifest, source)
        if tokens is None:
            return [*told, "errors of hidden states not measured again: the calibration text is not here"]
        walk = LayerWalk(source, device, compute_dtype(source, device))
        if origins:
            told.append(_fuse_again(merge_step, origins, walk, tokens, dtype, artifact.path, progress))
        if not quantize_step:
            told.append(_check_errors(merge_step, recover_step, artifact, walk, tokens))
    return told


def _outer_faults(
    artifact: Checkpoint, source: Checkpoint, scales: list[float], dtype: torch.dtype
) -> Iterator[str]:
    """What is wrong with the tensors outside of the layers, given the factors of the final norm in turn."""
    for name, tensor in source.each(source.outer_tensor_names):
        expected = tensor
        for scale in scales if name == FINAL_NORM else ():
            expected = scaled_norm(expected, scale, source.family.norm_offset, dtype)
        if not torch.equal(expected.to(dtype), artifact.read([name])[name]):
            yield f"{name} is not the source's" + (", rescaled" if expected is not tensor else "")


def _calibration_again(manifest: Manifest, source: Checkpoint) -> torch.Tensor | None:
    """The calibration tokens of the run, or None if the text is not here or is another one."""
    try:
        section, claim = Recipe.model_validate(manifest.recipe).calibration, manifest.calibration
    except ValidationError:
        raise VerificationError("the recipe in the manifest is none", where=MANIFEST) from None
    try:
        texts, tokenizer = documents(section, "calibrate"), load_tokenizer(source.path)
        size = section.num_samples, section.max_seq_length
        tokens = calibration_tokens(texts, tokenizer, *size, section.seed)
    except MkaqError:
        return None
    return (
        learning_samples(ALONE, tokens, section.seed)
        if claim and tokens_digest(tokens) == claim.tokens_sha256
        else None
    )


def _fuse_again(
    step: MergeStep,
    origins: list[Origins],
    walk: LayerWalk,
    tokens: torch.Tensor,
    dtype: torch.dtype,
    where: Path,
    progress: Progress,
) -> str:
    """Fuses the recorded groups again: heads, channels, ridges and errors must be those of the manifest."""
    groups, faults = [sorted(_weights(layer)) for layer in step.layers], []
    streams = Streams.of(walk, tokens)
    made = progress.track(fused_layers(streams, groups, dtype), "fuse again", len(groups))
    for layer, origin, again in zip(step.layers, origins, made, strict=True):
        told = layer.fused
        assert told is not None
        found = Fused.model_validate(again.record["fused"])
        if again.origins != origin:
            faults.append(f"layer {layer.new}: fusing again takes other heads or channels")
        for name, a, b in (
            ("o_proj", told.attention, found.attention),
            ("down_proj", told.mlp, found.mlp),
        ):
            if a.ridge != b.ridge or not (_near(a.error, b.error) and _near(a.error_before, b.error_before)):
                faults.append(f"layer {layer.new}: {name} solved again has {b}, the manifest says {a}")
        if not _near(told.residual, found.residual):
            faults.append(
                f"layer {layer.new} fused again leaves an error of {found.residual:.6g}, the manifest says "
                f"{told.residual:.6g}"
            )
    norm, norm_again = step.final_norm, streams.rescale()
    if norm is None or not all(
        _near(a, b) for a, b in zip(norm.model_dump().values(), asdict(norm_again).values(), strict=True)
    ):
        faults.append(f"the final norm rescaled again has {norm_again}, the manifest says {norm}")
    raise_faults(where, faults)
    return f"{len(groups)} layers fused again: heads, channels, ridges and errors are those of the manifest"


def _known_layers(
    step: MergeStep | None,
    origins: list[Origins],
    source: Checkpoint,
    dtype: torch.dtype,
) -> Iterator[tuple[dict[str, torch.Tensor], bool]]:
    """For each new layer the tensors that follow from the source, and whether these are all."""
    if not origins:
        every = [{index: 1.0} for index in range(source.num_layers)]
        weights = [_weights(layer) for layer in step.layers] if step else every
        for tensors in merged_layers(source, MergePlan((), tuple(weights)), dtype):
            yield tensors, True
        return
    assert step is not None
    config, linears = source.hf_config, source.family.linear_names
    kinds = {"heads": attention_parts(config, linears), "channels": mlp_parts(config, linears)}
    for layer, origin in zip(step.layers, origins, strict=True):
        group = sorted(_weights(layer))
        layers = [_tensors_of(source, index) for index in group]
        parts = []
        for name, kind in kinds.items():
            places = as_tensor(origin[name])
            places[:, 0] -= group[0]
            parts.append((kind, places))
        yield known_tensors(layers, parts, dtype), False


def _layer_faults(
    artifact: Checkpoint,
    new: int,
    known: Mapping[str, torch.Tensor],
    whole: bool,
    record: NewLayer | None,
    errors: Mapping[str, Module],
) -> Iterator[str]:
    """What is wrong with a layer of the artifact, given the tensors that it should have."""
    stored = _tensors_of(artifact, new)
    present = dense_layer(stored, artifact.quantization)
    if record and (whole or not errors):
        digest = digest_layer(known if whole else stored)
        if digest != record.sha256:
            yield f"layer {new} has another digest than the manifest says"
    for name, tensor in known.items():
        module = _module(new, name)
        if module in errors and name.endswith(".weight"):
            told, actual = errors[module], relative_error(tensor, present[name])
            if _is_source(told) and not math.isclose(actual, told.weight_error, rel_tol=_SAME, abs_tol=1e-12):
                claimed = f"the manifest says {told.weight_error:.6g}"
                yield f"{module} has a weight error of {actual:.6g}, {claimed}"
        elif not torch.equal(tensor, present[name]):
            yield f"model.layers.{new}.{name} is not what the recorded merge gives"


def _check_errors(
    merge_step: MergeStep,
    recover_step: RecoverStep | None,
    artifact: Checkpoint,
    source: LayerWalk,
    tokens: torch.Tensor,
) -> str:
    """Walks source and artifact side by side over the calibration tokens."""
    walk = LayerWalk(artifact, source.device, source.dtype)
    original, states = source.embed(tokens), walk.embed(tokens)
    faults = []
    for new, layer in enumerate(merge_step.layers):
        for index in sorted(_weights(layer)):
            source.pass_layer(index, original)
        walk.pass_layer(new, states)
        told = (
            recover_step.layers[new].error if recover_step else layer.fused.residual if layer.fused else 0.0
        )
        actual = held_out_error(states, original)
        if not _near(actual, told):
            faults.append(f"layer {new} leaves an error of {actual:.6g}, the manifest says {told:.6g}")
    norm = recover_step.final_norm if recover_step else merge_step.final_norm
    actual = rescale(source, walk, original, states).error_before  # with the artifact's own final norm
    if norm and not _near(actual, norm.error):
        faults.append(f"the final norm leaves an error of {actual:.6g}, the manifest says {norm.error:.6g}")
    raise_faults(artifact.path, faults)
    return f"the hidden states of {len(merge_step.layers)} layers have the errors that the manifest says"


def _near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=_CLOSE, abs_tol=1e-6)


def _is_source(module: Module | None) -> bool:
    """Whether the weight that was rounded is the merged model's own, not one solved anew."""
    return module is not None and module.ridge is None


def _module(new: int, name: str) -> str:
    return f"model.layers.{new}.{name.removesuffix('.weight')}"


def _weights(layer: NewLayer) -> dict[int, float]:
    return {int(old): weight for old, weight in layer.from_.items()}


def _tensors_of(checkpoint: Checkpoint, index: int) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{index}."
    stored = checkpoint.read(checkpoint.layer_tensor_names(index))
    return {name.removeprefix(prefix): tensor for name, tensor in stored.items()}


def _recovery_faults(step: MergeStep, recovery: RecoverStep) -> Iterator[str]:
    """Whether the tuned layers are those of the merge."""
    if [layer.new for layer in recovery.layers] != list(range(len(step.layers))):
        yield f"the recovered layers are not 0 to {len(step.layers) - 1}"
    for layer in recovery.layers:
        if layer.error > layer.error_before:
            yield f"recovered layer {layer.new} is said to be worse than before: such weights are not kept"


def _origin_faults(step: MergeStep, origins: list[Origins], source: Checkpoint) -> Iterator[str]:
    """Whether the origins are those of the manifest, and can be."""
    if len(origins) != len(step.layers):
        yield f"{ORIGINS} has {len(origins)} layers, the manifest {len(step.layers)}"
        return
    groups = [sorted(_weights(layer)) for layer in step.layers]
    if [index for group in groups for index in group] != list(range(source.num_layers)):
        yield "the new layers do not stand for all layers of the source, in their order"
    counts = {
        "heads": source.hf_config.num_key_value_heads,
        "channels": source.hf_config.intermediate_size,
    }
    for layer, group, origin in zip(step.layers, groups, origins, strict=True):
        if layer.fused is None or digest_of(origin) != layer.fused.origins_sha256:
            yield f"layer {layer.new}: its origins are not those of the manifest"
            continue
        for kind, count in counts.items():
            places = as_tensor(origin[kind])
            inside = set(places[:, 0].tolist()) <= set(group) and bool(
                ((places[:, 1] >= 0) & (places[:, 1] < count)).all()
            )
            if len(places) != count or not inside or len(places.unique(dim=0)) != count:  # type: ignore[no-untyped-call]
                yield f"layer {layer.new}: its {kind} are not {count} of those of layers {group}"
        taken = as_tensor(origin["channels"])[:, 0]
        share = {index: float((taken == index).sum()) / counts["channels"] for index in group}
        if share != _weights(layer):
            yield f"layer {layer.new}: its channels do not have the shares that the manifest says"


def _plan_faults(step: MergeStep, source: Checkpoint) -> Iterator[str]:
    """Whether the weights of the new layers follow from the recorded merges."""
    groups: dict[int, dict[int, float]] = {index: {index: 1.0} for index in range(source.num_layers)}
    for merge in step.merges:
        if merge.into not in groups or merge.from_ not in groups:
            yield f"the merge of {merge.from_} into {merge.into} names a layer that is gone"
            return
        later = groups.pop(merge.from_)
        weights = {index: weight * merge.coefficient for index, weight in groups[merge.into].items()}
        groups[merge.into] = weights | {
            index: weight * (1 - merge.coefficient) for index, weight in later.items()
        }
    recorded = [_weights(layer) for layer in step.layers]
    if [layer.new for layer in step.layers] != list(range(len(step.layers))):
        yield "the new layers are not numbered from 0"
    if recorded != [groups[index] for index in sorted(groups)]:
        yield "the weights of the new layers do not follow from the recorded merges"
    if step.final_norm:
        yield "the final norm is said to be rescaled, and averaging does not"
