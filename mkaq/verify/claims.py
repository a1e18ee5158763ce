"""Consistency of a manifest's claims about merging, recovery and quantization."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mkaq.checkpoint.reader import Checkpoint
from mkaq.digests import digest_of
from mkaq.distill.gate import best_check
from mkaq.fit.ridge import RIDGES
from mkaq.merge.origins import ORIGINS, Origins, as_tensor

if TYPE_CHECKING:
    from mkaq.stages.distill import DistillRecord
    from mkaq.stages.merge import MergeRecord
    from mkaq.stages.quantize import QuantizeRecord
    from mkaq.stages.recover import RecoverRecord


def distillation_faults(step: "DistillRecord") -> Iterator[str]:
    """Yields measurements out of order, and a choice that they do not give."""
    checks = step.curve()
    numbers = [check.step for check in checks]
    if numbers[0] != 0 or sorted(set(numbers)) != numbers or numbers[-1] > step.steps:
        yield f"the measurements of the distillation are not of rising steps, from 0 to at most {step.steps}"
    elif not all(math.isfinite(value) for check in checks for value in (check.own, check.other)):
        yield "a measurement of the distillation is not finite"
    elif step.best != best_check(checks):
        yield f"the measurements of the distillation choose number {best_check(checks)}, not {step.best}"


def recovery_faults(step: "RecoverRecord", layers: int) -> Iterator[str]:
    """Yields wrong layer numbers, and errors that grew; the last layer's may, if the divergence fell."""
    if [layer.new for layer in step.layers] != list(range(layers)):
        yield f"the recovered layers are not 0 to {layers - 1}"
    if step.divergence > step.divergence_before:
        yield "the divergence is said to have grown: such weights are not kept"
    for layer in step.layers[:-1] if step.divergence < step.divergence_before else step.layers:
        if layer.error > layer.error_before:
            yield f"recovered layer {layer.new} is said to be worse than before: such weights are not kept"


def origin_faults(step: "MergeRecord", origins: list[Origins], source: Checkpoint) -> Iterator[str]:
    """Yields origins that are impossible or differ from the manifest's."""
    if len(origins) != len(step.layers):
        yield f"{ORIGINS} has {len(origins)} layers, the manifest {len(step.layers)}"
        return
    groups = [sorted(layer.weights) for layer in step.layers]
    if [index for group in groups for index in group] != list(range(source.num_layers)):
        yield "the new layers do not stand for all layers of the source, in their order"
    counts = {
        "heads": source.sizes.kv_heads,
        "channels": source.sizes.intermediate,
    }
    for layer, group, origin in zip(step.layers, groups, origins, strict=True):
        if layer.fused is None or digest_of(origin) != layer.fused.origins_sha256:
            yield f"layer {layer.new}: its origins are not those of the manifest"
            continue
        for kind, count in counts.items():
            parts = as_tensor(origin[kind])
            inside = set(parts[:, 0].tolist()) <= set(group) and bool(
                ((parts[:, 1] >= 0) & (parts[:, 1] < count)).all()
            )
            if len(parts) != count or not inside or len(parts.unique(dim=0)) != count:  # type: ignore[no-untyped-call]
                yield f"layer {layer.new}: its {kind} are not {count} of those of layers {group}"
        for name, solved in (("o_proj", layer.fused.attention), ("down_proj", layer.fused.mlp)):
            if solved.ridge not in (None, *RIDGES):
                yield f"layer {layer.new}: {name} is said to be solved with a ridge of {solved.ridge}"
            if solved.ridge is None and solved.error != solved.error_before:
                yield f"layer {layer.new}: {name} is said to be as it was, and to leave another error"
        taken = as_tensor(origin["channels"])[:, 0]
        fractions = {index: float((taken == index).sum()) / counts["channels"] for index in group}
        if fractions != layer.weights:
            yield f"layer {layer.new}: its channels do not have the shares that the manifest says"


def residual_faults(step: "QuantizeRecord", needed: bool) -> Iterator[str]:
    """Yields a fault if errors of hidden states are missing, unneeded or incomplete."""
    if (step.residuals is not None) != needed:
        yield "the quantized layers have " + (
            "no recorded errors" if needed else "errors that none asked for"
        )
    elif step.residuals is not None and len(step.residuals) != step.layers_after:
        yield f"{len(step.residuals)} errors are recorded for {step.layers_after} quantized layers"


def plan_faults(step: "MergeRecord", source: Checkpoint) -> Iterator[str]:
    """Yields the faults of averages that do not follow from the recorded merges."""
    groups: dict[int, dict[int, float]] = {index: {index: 1.0} for index in range(source.num_layers)}
    for merge in step.merges:
        if merge.into == merge.from_ or not {merge.into, merge.from_} <= groups.keys():
            yield f"the merge of {merge.from_} into {merge.into} names a layer that is gone"
            return
        later = groups.pop(merge.from_)
        weights = {index: weight * merge.coefficient for index, weight in groups[merge.into].items()}
        groups[merge.into] = weights | {
            index: weight * (1 - merge.coefficient) for index, weight in later.items()
        }
    recorded = [layer.weights for layer in step.layers]
    if [layer.new for layer in step.layers] != list(range(len(step.layers))):
        yield "the new layers are not numbered from 0"
    if recorded != [groups[index] for index in sorted(groups)]:
        yield "the weights of the new layers do not follow from the recorded merges"
    if step.final_norm:
        yield "the final norm is said to be rescaled, and averaging does not"
