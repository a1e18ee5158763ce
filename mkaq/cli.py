"""The command line. torch and transformers are imported inside commands, so that --help is instant."""

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mkaq import __version__
from mkaq.console import print_json, print_table, print_whatever_it_is
from mkaq.errors import UsageError, as_mkaq_error

if TYPE_CHECKING:
    from mkaq.recipe import Recipe

app = typer.Typer(
    name="mkaq",
    help="Merge the similar layers of a language model, quantize the rest, ship one verified artifact.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")
]
Setting = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a key, e.g. merge.ratio=0.25.")
]
Output = Annotated[
    Path | None, typer.Option("--output", metavar="DIR", help="Folder of the run [runs/NAME].")
]
Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")]
MaxMemory = Annotated[
    str | None,
    typer.Option("--max-memory", metavar="SIZE", help="Use no more memory than this, such as 6GB."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a hub id, or builtin:tiny-llama.")]
Artifact = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="The artifact's folder.")]


def _version(value: bool) -> None:
    if value:
        print(f"mkaq {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    pass


@app.command()
def run(
    recipe: RecipeArgument,
    settings: Setting = [],  # noqa: B006 (typer copies it)
    output: Output = None,
    until: Annotated[
        Literal["calibrate", "merge", "recover", "quantize", "export"],
        typer.Option(help="The last stage to run."),
    ] = "export",
    fresh: Annotated[bool, typer.Option("--fresh", help="Make every stage again.")] = False,
    device: Device = "auto",
    max_memory: MaxMemory = None,
    as_json: AsJson = False,
) -> None:
    """Run a recipe: calibrate, merge, recover, quantize, export. Finished stages are kept."""
    loaded, folder = _load(recipe, settings, output)
    _quiet_libraries()
    from mkaq import pipeline
    from mkaq.export.manifest import read_manifest
    from mkaq.formats.runtimes import describe, runtimes
    from mkaq.progress import Progress
    from mkaq.ranks import joined
    from mkaq.recipe import Recipe
    from mkaq.run.report import table_rows
    from mkaq.walk.device import pick_device

    limit = _bytes(max_memory)
    with joined(pick_device(device)) as (ranks, place):
        progress = Progress(quiet=not ranks.main)
        result = pipeline.run(
            loaded, folder, place, progress, until=until, fresh=fresh, max_memory=limit, ranks=ranks
        )
    if not ranks.main:
        return
    made = Recipe.model_validate(read_manifest(result.artifact).recipe) if result.artifact else None
    found = runtimes(made.quantize) if made else []
    if as_json:
        stages = [vars(size) | result.evaluation.get(size.stage, {}) for size in result.sizes]
        print_json(
            {
                "stages": stages,
                "artifact": str(result.artifact) if result.artifact else None,
                "runtimes": [vars(row) for row in found],
                "run": str(folder),
            }
        )
        return
    print_table(
        ("stage", "layers", "parameters", "bytes on disk", "perplexity"),
        table_rows(result.sizes, result.evaluation),
    )
    for line in describe(found) if found else ():
        print(line)
    print(f"artifact: {result.artifact}" if result.artifact else f"stopped after {until}: {folder}")


@app.command()
def plan(
    recipe: RecipeArgument,
    settings: Setting = [],  # noqa: B006
    output: Output = None,
    device: Device = "auto",
    max_memory: MaxMemory = None,
    processes: Annotated[int, typer.Option(min=1, help="As many as torchrun will start.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Say what a run would do: layers, sizes, memory, disk. Changes nothing."""
    loaded, folder = _load(recipe, settings, output)
    _quiet_libraries()
    from mkaq.checkpoint.resolve import resolve_model
    from mkaq.checkpoint.validate import open_checkpoint
    from mkaq.formats.runtimes import describe, runtimes
    from mkaq.run.budget import plan_budget, settle
    from mkaq.run.plan import remarks
    from mkaq.run.report import table_rows
    from mkaq.units import human
    from mkaq.walk.device import pick_device

    source = open_checkpoint(resolve_model(loaded.model.path, loaded.model.revision))
    for remark in source.remarks:
        print(f"note: {remark}", file=sys.stderr)
    told = list(remarks(loaded, processes))
    options, planned = plan_budget(loaded, source, pick_device(device), _bytes(max_memory), processes)
    settled = [settle(loaded, option) for option in options] or [loaded]
    found = runtimes(*(choice.quantize for choice in settled))
    if as_json:
        stages = [vars(size) for size in planned.sizes]
        print_json(
            {
                "stages": stages,
                "options": [vars(option) for option in options],
                "memory_bytes": planned.memory_bytes,
                "memory": planned.memory,
                "hidden_states": planned.place,
                "host_bytes": planned.host_bytes,
                "remarks": told,
                "disk_bytes": planned.disk_bytes,
                "runtimes": [vars(row) for row in found],
                "run": str(folder),
            }
        )
        return
    if options:
        sizes = [(str(o.removed), str(o.bits or "-"), human(o.bytes)) for o in options]
        print_table(("layers removed", "bits", "bytes of weights"), sizes)
        print("the run tries these against the budget; at most it needs:")
    rows = [row[:4] for row in table_rows(list(planned.sizes), {})]
    print_table(("stage", "layers", "parameters", "bytes of weights"), rows)
    needs = ", ".join(f"{stage} {human(need)}" for stage, need in planned.memory.items())
    each = "" if processes == 1 else f" of each of {processes} processes"
    print(f"memory: about {human(planned.memory_bytes)} at the peak{each} ({needs})")
    if planned.place == "files":
        print("        hidden states go to files in the run's folder")
    elif planned.place == "host":
        print(f"        hidden states lie in the host's memory: {human(planned.host_bytes)}")
    for line in told:
        print(line)
    print(f"disk:   {human(planned.disk_bytes)} in {folder}")
    for line in describe(found):
        print(line)


@app.command()
def analyze(
    model: Model,
    heatmap: Annotated[Path, typer.Option("--heatmap", metavar="PNG", help="Where the heatmap goes.")] = Path(
        "similarity.png"
    ),
    dataset: Annotated[str, typer.Option(help="builtin, text, jsonl, wikitext2 or mmlu.")] = "builtin",
    path: Annotated[str | None, typer.Option(help="File or folder of the dataset.")] = None,
    num_samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    max_seq_length: Annotated[int, typer.Option(help="Tokens of each.")] = 512,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Compare the layers of a model: a table of neighbours and a heatmap of all pairs."""
    _quiet_libraries()
    from mkaq.calibrate.text import documents
    from mkaq.calibrate.tokenizer import load_tokenizer
    from mkaq.calibrate.tokens import calibration_tokens
    from mkaq.checkpoint.resolve import resolve_model
    from mkaq.checkpoint.validate import open_checkpoint
    from mkaq.merge.compare import compare_layers
    from mkaq.progress import Progress
    from mkaq.recipe import CalibrationSection, ManifoldSection
    from mkaq.run.report import save_heatmap
    from mkaq.walk.device import compute_dtype, pick_device
    from mkaq.walk.walk import LayerWalk

    values = {"dataset": dataset, "path": path, "num_samples": num_samples, "max_seq_length": max_seq_length}
    section = _section(CalibrationSection, values)
    checkpoint, place = open_checkpoint(resolve_model(model), quantized=True), pick_device(device)
    texts = documents(section, "calibrate")
    tokens = calibration_tokens(
        texts, load_tokenizer(checkpoint.path), num_samples, max_seq_length, section.seed
    )
    walk = LayerWalk(checkpoint, place, compute_dtype(checkpoint.dtype, place, fast=True))
    matrix = compare_layers(walk, tokens, ManifoldSection(), section.seed, Progress()).matrix
    save_heatmap(matrix, heatmap)
    if as_json:
        print_json({"npib": matrix.tolist(), "heatmap": str(heatmap)})
        return
    rows = [
        (f"{i} - {i + 1}", f"{matrix[i, i + 1]:.3f}", "#" * round(40 * matrix[i, i + 1]))
        for i in range(len(matrix) - 1)
    ]
    print_table(("layers", "NPIB", ""), rows)
    print(f"heatmap: {heatmap}")


@app.command()
def inspect(artifact: Artifact, as_json: AsJson = False) -> None:
    """Show the manifest of an artifact."""
    from mkaq.export.manifest import read_manifest
    from mkaq.export.summary import describe_step
    from mkaq.run.budget import describe
    from mkaq.units import human

    manifest = read_manifest(artifact)
    if as_json:
        print_json(manifest.model_dump(mode="json", by_alias=True))
        return
    source = manifest.source
    print(f"{manifest.name}: made by mkaq {manifest.mkaq_version} from {source.path} ({source.model_type})")
    sizes = [("source", source.layers, source.parameters, source.bytes)]
    sizes += [
        (step.step, step.layers_after, step.parameters_after, step.bytes_after) for step in manifest.steps
    ]
    rows = []
    for stage, layers, parameters, size in sizes:
        measured = manifest.evaluation.get(stage, {}).get("perplexity")
        rows.append(
            (
                stage,
                str(layers),
                f"{parameters:,}",
                human(size),
                f"{measured['perplexity']:.2f}" if measured else "-",
            )
        )
    print_table(("stage", "layers", "parameters", "bytes", "perplexity"), rows)
    if manifest.budget:
        for line in describe(manifest.budget.model_dump()):
            print(line)
    for step in manifest.steps:
        for line in describe_step(step):
            print(line)
    print(f"{len(manifest.files)} files, {human(sum(file.bytes for file in manifest.files))}")


@app.command()
def verify(
    artifact: Artifact,
    source: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original model: recompute the merge.")
    ] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Check every claim of an artifact's manifest."""
    _quiet_libraries()
    from mkaq.checkpoint.resolve import resolve_model
    from mkaq.paths import utf8_path
    from mkaq.progress import Progress
    from mkaq.verify.verify import verify as check
    from mkaq.walk.device import pick_device

    original = resolve_model(source) if source else None
    done = check(utf8_path(artifact), original, pick_device(device), Progress())
    if as_json:
        print_json({"verified": True, "checks": done})
        return
    for line in done:
        print(f"ok: {line}")
    print(f"verified: {artifact}")


@app.command(name="eval")
def evaluate(
    model: Model,
    dataset: Annotated[str, typer.Option(help="builtin, text, jsonl, wikitext2 or mmlu.")] = "builtin",
    path: Annotated[str | None, typer.Option(help="File or folder of the dataset.")] = None,
    num_samples: Annotated[int | None, typer.Option(help="At most this many sequences.")] = None,
    max_seq_length: Annotated[int, typer.Option(help="Tokens of each.")] = 512,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness instead, comma-separated.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many examples of each task.")] = None,
    include_path: Annotated[str | None, typer.Option(help="Folder with task files of your own.")] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure perplexity, layer by layer (the model may be larger than memory), or the scores of tasks."""
    if tasks is None and (limit is not None or include_path is not None):
        raise UsageError("--limit and --include-path are read with --tasks only", where="eval")
    if tasks is not None and (dataset, path, num_samples, max_seq_length) != ("builtin", None, None, 512):
        raise UsageError("a task brings its own text: leave out the options of perplexity", where="--tasks")
    _quiet_libraries()
    from mkaq.calibrate.text import documents
    from mkaq.calibrate.tokenizer import load_tokenizer
    from mkaq.calibrate.tokens import evaluation_sequences
    from mkaq.checkpoint.resolve import resolve_model
    from mkaq.checkpoint.validate import open_checkpoint
    from mkaq.evaluate.perplexity import perplexity
    from mkaq.evaluate.tasks import run_tasks
    from mkaq.progress import Progress
    from mkaq.recipe import PerplexitySection
    from mkaq.run.report import with_error
    from mkaq.walk.device import compute_dtype, pick_device
    from mkaq.walk.walk import LayerWalk

    checkpoint, place = open_checkpoint(resolve_model(model), quantized=True), pick_device(device)
    tokenizer, dtype = load_tokenizer(checkpoint.path), compute_dtype(checkpoint.dtype, place)
    if tasks is not None:
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        scores = run_tasks(checkpoint, tokenizer, names, place, dtype, limit=limit, include_path=include_path)
        if as_json:
            print_json({"model": model, "tasks": scores})
            return
        rows = [
            (task, name, f"{value:.4f}")
            for task, metrics in scores.items()
            for name, value in metrics.items()
        ]
        print_table(("task", "metric", "value"), rows)
        return
    values = {"dataset": dataset, "path": path, "num_samples": num_samples, "max_seq_length": max_seq_length}
    section: PerplexitySection = _section(PerplexitySection, values)
    sequences = evaluation_sequences(documents(section, "evaluate"), tokenizer, max_seq_length, num_samples)
    measured = perplexity(LayerWalk(checkpoint, place, dtype), sequences, Progress())
    if as_json:
        print_json(
            {"model": model, "perplexity": measured.as_json(), "settings": section.model_dump(mode="json")}
        )
        return
    told = with_error(measured.perplexity, measured.standard_error, 4)
    print(f"perplexity: {told} ({measured.tokens:,} tokens)")


@app.command(name="generate")
def generate_text(
    artifact: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most this many tokens.")] = 64,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Continue a text, greedily."""
    _quiet_libraries()
    import torch

    from mkaq.calibrate.tokenizer import load_tokenizer
    from mkaq.checkpoint.end_tokens import end_tokens
    from mkaq.checkpoint.resolve import resolve_model
    from mkaq.checkpoint.validate import open_checkpoint
    from mkaq.walk.device import compute_dtype, pick_device
    from mkaq.walk.whole_model import generate, whole_model

    checkpoint, place = open_checkpoint(resolve_model(artifact), quantized=True), pick_device(device)
    tokenizer = load_tokenizer(checkpoint.path)
    if prompt.encode(errors="ignore").decode() != prompt:
        raise UsageError("the prompt is not UTF-8", where="PROMPT")
    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise UsageError("the prompt has no tokens", where="PROMPT")
    stop = end_tokens(checkpoint.path, tokenizer)
    model = whole_model(checkpoint, place, compute_dtype(checkpoint.dtype, place))
    new = generate(model, torch.tensor([ids], device=place), max_new_tokens, stop)
    text = tokenizer.decode(new)
    if as_json:
        print_json({"prompt": prompt, "text": text, "tokens": len(new)})
        return
    print(prompt + text)


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the recipes that ship."""
    from mkaq.shipped import shipped_recipes

    listed = [(path.stem, told, str(path)) for path, told in shipped_recipes()]
    if as_json:
        print_json([{"name": name, "about": told, "path": path} for name, told, path in listed])
        return
    width = max(len(name) for name, _, _ in listed)
    for name, told, path in listed:
        print(f"{name:<{width}}  {told}\n{'':<{width}}  {path}")


@app.command()
def schema() -> None:
    """Print the recipe's JSON schema, for editors."""
    from mkaq.recipe import Recipe

    print_json(Recipe.model_json_schema())


def _load(recipe: str, settings: list[str], output: Path | None) -> "tuple[Recipe, Path]":
    from mkaq.paths import utf8_path
    from mkaq.recipe_file import load_recipe
    from mkaq.shipped import find_recipe

    loaded = load_recipe(find_recipe(recipe), settings)
    return loaded, utf8_path(output or Path("runs") / loaded.name)


def _bytes(size: str | None) -> int | None:
    from mkaq.units import parse_size

    try:
        return None if size is None else parse_size(size)
    except ValueError as error:
        raise UsageError(str(error), where="--max-memory") from None


def _section(kind: Any, values: dict[str, Any]) -> Any:
    from pydantic import ValidationError

    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = f"--{str(first['loc'][0]).replace('_', '-')}" if first["loc"] else "--dataset"
        raise UsageError(str(first["msg"]).removeprefix("Value error, "), where=option) from None


def _quiet_libraries() -> None:
    """Libraries log nothing of their own and never go to the network behind the recipe's back."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)


def main() -> None:
    """The entry point: runs a command and turns every error into one message and an exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print_whatever_it_is()
    try:
        arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
        if app(arguments or ["--help"], standalone_mode=False) == 130:
            raise KeyboardInterrupt  # 130 is what typer makes of it
    except BrokenPipeError:
        sys.exit(0)
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        told = as_mkaq_error(error)
        print(f"mkaq: {told}", file=sys.stderr)
        sys.exit(told.exit_code)
    sys.exit(0)
