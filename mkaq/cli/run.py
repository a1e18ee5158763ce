"""Commands that take a recipe: run it, or show what a run would do."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from mkaq.cli import options
from mkaq.cli.options import AsJson, Device, MaxMemory, Output, RecipeArgument, Setting
from mkaq.console import print_json, print_table, say

if TYPE_CHECKING:
    from mkaq.errors import ResourceError
    from mkaq.formats.runtimes import Runtime
    from mkaq.plan import RunPlan
    from mkaq.result import RunResult


_UNTIL = ("calibrate", "teacher", "analyze", "merge", "recover", "distill", "quantize", "export")
"""The names of the pipeline's stages, written out: to import them would take most of the time of --help."""


def _valid_stage(until: str) -> str:
    if until not in _UNTIL:
        raise typer.BadParameter(f"{until!r} is not one of {', '.join(_UNTIL)}.")
    return until


def run(
    recipe: RecipeArgument,
    settings: Setting = [],  # noqa: B006 (typer copies it)
    output: Output = None,
    until: Annotated[
        str,
        typer.Option(callback=_valid_stage, metavar=f"[{'|'.join(_UNTIL)}]", help="The last stage to run."),
    ] = "export",
    fresh: Annotated[bool, typer.Option("--fresh", help="Make every stage again.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say why a stage is made again: what differs.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail where a stage cannot do all that the recipe asks.")
    ] = False,
    device: Device = "auto",
    max_memory: MaxMemory = None,
    as_json: AsJson = False,
) -> None:
    """Run a recipe: calibrate, analyze, merge, recover, quantize, export. Finished stages are kept."""
    loaded, folder = options.load(recipe, settings, output)
    options.quiet_libraries()
    from mkaq import pipeline
    from mkaq.checkpoint.validate import open_checkpoint
    from mkaq.formats.runtimes import runtimes
    from mkaq.progress import Progress
    from mkaq.ranks import joined
    from mkaq.walk.device import pick_device

    limit = options.bytes(max_memory)
    with joined(pick_device(device)) as (ranks, torch_device):
        progress = Progress(quiet=not ranks.is_main)
        result = pipeline.run(
            loaded,
            folder,
            torch_device,
            progress,
            until=until,
            fresh=fresh,
            explain=explain,
            strict=strict,
            max_memory=limit,
            ranks=ranks,
        )
    if not ranks.is_main:
        return
    runtime_rows: list[Runtime] = []
    if result.artifact:
        config = open_checkpoint(result.artifact, quantized=True).quantization
        runtime_rows = runtimes(config, formats=loaded.export.others)
    if as_json:
        _print_run_as_json(result, runtime_rows)
    else:
        _print_run(result, runtime_rows, until)


def _print_run_as_json(result: "RunResult", runtime_rows: "Sequence[Runtime]") -> None:
    from mkaq.run.quality import quality_lines

    stages = [vars(size) | result.evaluation.get(size.stage, {}) for size in result.sizes]
    print_json(
        {
            "stages": stages,
            "fallbacks": result.fallbacks,
            "warnings": list(quality_lines({}, result.evaluation)),
            "artifact": str(result.artifact) if result.artifact else None,
            "runtimes": [vars(row) for row in runtime_rows],
            "run": str(result.folder),
        }
    )


def _print_run(result: "RunResult", runtime_rows: "Sequence[Runtime]", until: str) -> None:
    from mkaq.formats.runtimes import describe
    from mkaq.report import table_rows
    from mkaq.run.quality import quality_lines

    print_table(
        ("stage", "layers", "parameters", "bytes on disk", "perplexity", "how"),
        table_rows(result.sizes, result.evaluation),
    )
    for line in quality_lines(result.fallbacks, result.evaluation):
        say(line)
    for line in describe(runtime_rows) if runtime_rows else ():
        say(line)
    say(f"artifact: {result.artifact}" if result.artifact else f"stopped after {until}: {result.folder}")


def plan(
    recipe: RecipeArgument,
    settings: Setting = [],  # noqa: B006
    output: Output = None,
    device: Device = "auto",
    max_memory: MaxMemory = None,
    processes: Annotated[int, typer.Option(min=1, help="Number of processes that torchrun will start.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Show what a run would do: layers, sizes, memory, time, disk; fail as it would. Changes nothing."""
    loaded, folder = options.load(recipe, settings, output)
    options.quiet_libraries()
    from mkaq.checkpoint.resolve import resolve_model
    from mkaq.checkpoint.validate import open_checkpoint
    from mkaq.formats.runtimes import runtimes
    from mkaq.plan import memory_of, plan_recipe, quantizations, refusal, remarks, too_long
    from mkaq.walk.device import pick_device

    source = open_checkpoint(resolve_model(loaded.model.path, loaded.model.revision))
    for remark in source.remarks:
        say(f"note: {remark}", error=True)
    torch_device, limit = pick_device(device), options.bytes(max_memory)
    planned = plan_recipe(loaded, source, torch_device, limit, processes)
    refused = refusal(planned, folder, torch_device, limit)
    beyond = planned.memory_bytes > memory_of(torch_device, processes)  # even a piece may not fit
    seconds = {} if beyond else planned.seconds(source, torch_device, folder)
    forecast = _Forecast(
        plan=planned,
        seconds=seconds,
        refused=refused,
        notes=[*remarks(loaded, processes), *too_long(seconds, torch_device)],
        runtimes=runtimes(*quantizations(loaded, source, planned), formats=loaded.export.others),
        folder=folder,
    )
    if as_json:
        _print_plan_as_json(forecast)
    else:
        _print_plan(forecast, processes)
    if forecast.refused:
        raise forecast.refused


class _Forecast(NamedTuple):
    """What `mkaq plan` prints."""

    plan: "RunPlan"
    seconds: "Mapping[str, float]"
    refused: "ResourceError | None"
    notes: Sequence[str]
    runtimes: "Sequence[Runtime]"
    folder: Path


def _print_plan_as_json(forecast: _Forecast) -> None:
    planned = forecast.plan
    print_json(
        {
            "stages": [vars(size) for size in planned.sizes],
            "options": [vars(choice) for choice in planned.options],
            "memory_bytes": planned.memory_bytes,
            "memory": planned.memory,
            "hidden_states": planned.place,
            "host_bytes": planned.host_bytes,
            "seconds": {stage: round(seconds) for stage, seconds in forecast.seconds.items()},
            "remarks": forecast.notes,
            "disk_bytes": planned.disk_bytes,
            "refused": forecast.refused.what if forecast.refused else None,
            "runtimes": [vars(row) for row in forecast.runtimes],
            "run": str(forecast.folder),
        }
    )


def _print_plan(forecast: _Forecast, processes: int) -> None:
    from mkaq.formats.runtimes import describe
    from mkaq.report import table_rows
    from mkaq.units import duration, human

    planned = forecast.plan
    if planned.options:
        sizes = [(str(o.removed), str(o.bits or "-"), human(o.bytes)) for o in planned.options]
        print_table(("layers removed", "bits", "bytes of weights"), sizes)
        say("the run tries these against the budget; at most it needs:")
    rows = [(*row[:4], row[-1]) for row in table_rows(list(planned.sizes), {})]
    print_table(("stage", "layers", "parameters", "bytes of weights", "how"), rows)
    needs = ", ".join(f"{stage} {human(need)}" for stage, need in planned.memory.items())
    per_process = "" if processes == 1 else f" of each of {processes} processes"
    say(f"memory: about {human(planned.memory_bytes)} at the peak{per_process} ({needs})")
    if planned.place == "files":
        say("        hidden states go to files in the run's folder")
    elif planned.place == "host":
        say(f"        hidden states lie in the host's memory: {human(planned.host_bytes)}")
    if forecast.seconds:
        times = [f"{stage} {duration(time)}" for stage, time in forecast.seconds.items() if time >= 1]
        total = duration(sum(forecast.seconds.values())) + (" for each trial" if planned.options else "")
        say(f"time:   about {total} on this machine ({', '.join(times) or 'all short'})")
    for line in forecast.notes:
        say(line)
    say(f"disk:   {human(planned.disk_bytes)} in {forecast.folder}")
    for line in describe(forecast.runtimes):
        say(line)
