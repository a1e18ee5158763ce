"""What a step did, in lines for a person."""

from collections.abc import Iterator

from mkaq.export.manifest import MergeStep, NewLayer, QuantizeStep, RecoverStep


def describe_step(step: MergeStep | RecoverStep | QuantizeStep) -> Iterator[str]:
    """A few lines for each step of a manifest."""
    if isinstance(step, MergeStep):
        yield from (_describe_layer(layer) for layer in step.layers if len(layer.from_) > 1)
        if fused := [layer.fused for layer in step.layers if layer.fused]:
            solved = sum(f.attention.ridge is not None or f.mlp.ridge is not None for f in fused)
            yield (
                f"{solved} of {len(fused)} layers solved toward the original hidden states; "
                f"error at the end {fused[-1].residual:.4f}"
            )
    elif isinstance(step, RecoverStep):
        tuned = sum(layer.steps > 0 for layer in step.layers)
        last = step.layers[-1]
        yield f"recover: {tuned} of {len(step.layers)} layers tuned; error at the end {last.error:.4f}"
    else:
        worst = max(step.modules, key=lambda module: module.error or module.weight_error)
        kind, error = ("output", worst.error) if worst.error is not None else ("weight", worst.weight_error)
        yield (
            f"{step.method}, {step.bits} bits, {len(step.modules)} modules; "
            f"largest {kind} error {error:.2e} ({worst.name})"
        )
    if norm := step.final_norm:
        yield f"final norm times {norm.scale:.4f}; error {norm.error_before:.4f} to {norm.error:.4f}"


def _describe_layer(layer: NewLayer) -> str:
    if layer.fused:
        mix = ", ".join(f"{share:.0%} of {old}" for old, share in layer.from_.items())
        return f"layer {layer.new}: channels {mix}; error {layer.fused.residual:.4f}"
    return f"layer {layer.new} = " + " + ".join(
        f"{weight:.3f} x {old}" for old, weight in layer.from_.items()
    )
