"""Commands that read an artifact: show its manifest, verify it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mkaq.cli import options
from mkaq.cli.options import Artifact, AsJson, Device
from mkaq.console import print_json, print_table, say

if TYPE_CHECKING:
    from mkaq.manifest import Manifest


def inspect(artifact: Artifact, as_json: AsJson = False) -> None:
    """Show the manifest of an artifact."""
    from mkaq.manifest import read_manifest

    manifest = read_manifest(artifact)
    if as_json:
        print_json(manifest.model_dump(mode="json", by_alias=True))
    else:
        _print_manifest(manifest)


def _print_manifest(manifest: "Manifest") -> None:
    from mkaq.budget import describe
    from mkaq.pipeline import stage_of
    from mkaq.run.quality import quality_lines
    from mkaq.units import human

    source = manifest.source
    say(f"{manifest.name}: made by mkaq {manifest.mkaq_version} from {source.path} ({source.model_type})")
    print_table(("stage", "layers", "parameters", "bytes", "perplexity"), _stage_rows(manifest))
    for line in quality_lines(manifest.fallbacks, manifest.evaluation):
        say(line)
    if manifest.budget:
        for line in describe(manifest.budget.model_dump()):
            say(line)
    for step in manifest.steps:
        for line in stage_of(step.step).describe(step).lines:
            say(line)
    for each in manifest.exports:
        say(f"{each.format}: the same codes and weights in {human(each.bytes)}")
    say(f"{len(manifest.files)} files, {human(sum(file.bytes for file in manifest.files))}")


def _stage_rows(manifest: "Manifest") -> list[tuple[str, str, str, str, str]]:
    """Stage, layers, parameters, bytes and perplexity, as text."""
    from mkaq.units import decimal, human

    source = manifest.source
    sizes = [("source", source.layers, source.parameters, source.bytes)]
    sizes += [
        (step.step, step.layers_after, step.parameters_after, step.bytes_after) for step in manifest.steps
    ]
    rows = []
    for stage, layers, parameters, size in sizes:
        measured = manifest.evaluation.get(stage, {}).get("perplexity")
        perplexity = decimal(measured["perplexity"]) if measured else "-"
        rows.append((stage, str(layers), f"{parameters:,}", human(size), perplexity))
    return rows


def verify(
    artifact: Artifact,
    source: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original model, to recompute the merge.")
    ] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Check every claim of an artifact's manifest."""
    options.quiet_libraries()
    from mkaq.checkpoint.resolve import resolve_model
    from mkaq.paths import utf8_path
    from mkaq.progress import Progress
    from mkaq.verification import verify as check
    from mkaq.walk.device import pick_device

    original = resolve_model(source) if source else None
    checks = check(utf8_path(artifact), original, pick_device(device), Progress())
    _print_checks(checks, artifact, as_json=as_json)


def _print_checks(checks: list[str], artifact: Path, *, as_json: bool) -> None:
    if as_json:
        print_json({"verified": True, "checks": checks})
        return
    for line in checks:
        say(f"ok: {line}")
    say(f"verified: {artifact}")
