"""Commands that run a model: compare its layers, measure its quality."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mkaq.cli import options
from mkaq.cli.options import AsJson, Device, Model
from mkaq.console import print_json, print_table, say
from mkaq.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from mkaq.evaluate.perplexity import Perplexity
    from mkaq.stages.evaluate import PerplexitySection

_Dataset = Annotated[str, typer.Option(help="builtin, text, jsonl, wikitext2 or mmlu.")]
_DatasetPath = Annotated[str | None, typer.Option(help="File or folder of the dataset.")]
_Length = Annotated[int, typer.Option(help="Tokens per sequence.")]


def analyze(
    model: Model,
    heatmap: Annotated[Path, typer.Option("--heatmap", metavar="PNG", help="Where the heatmap goes.")] = Path(
        "similarity.png"
    ),
    dataset: _Dataset = "builtin",
    path: _DatasetPath = None,
    num_samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    max_seq_length: _Length = 512,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Compare the layers of a model: a table of neighbours and a heatmap of all pairs."""
    options.quiet_libraries()
    from mkaq.calibrate.text import documents
    from mkaq.calibrate.tokenizer import load_tokenizer
    from mkaq.calibrate.tokens import calibration_tokens
    from mkaq.checkpoint.resolve import resolve_model
    from mkaq.checkpoint.validate import open_checkpoint
    from mkaq.drawings import save_heatmap
    from mkaq.merge.compare import compare_layers
    from mkaq.progress import Progress
    from mkaq.stages.calibrate import CalibrationSection
    from mkaq.walk.device import compute_dtype, pick_device
    from mkaq.walk.walk import LayerWalk

    values = {"dataset": dataset, "path": path, "num_samples": num_samples, "max_seq_length": max_seq_length}
    section = options.section(CalibrationSection, values)
    checkpoint, torch_device = open_checkpoint(resolve_model(model), quantized=True), pick_device(device)
    texts = documents(section.dataset, section.path, "calibrate")
    tokens = calibration_tokens(
        texts, load_tokenizer(checkpoint.path), num_samples, max_seq_length, section.seed
    )
    walk = LayerWalk(checkpoint, torch_device, compute_dtype(checkpoint.dtype, torch_device, fast=True))
    matrix = compare_layers(walk, tokens, section.seed, Progress()).matrix
    save_heatmap(matrix, heatmap)
    _print_similarity(matrix, heatmap, as_json=as_json)


def _print_similarity(matrix: "npt.NDArray[np.float64]", heatmap: Path, *, as_json: bool) -> None:
    if as_json:
        print_json({"npib": matrix.tolist(), "heatmap": str(heatmap)})
        return
    rows = [
        (f"{i} - {i + 1}", f"{matrix[i, i + 1]:.3f}", "#" * round(40 * matrix[i, i + 1]))
        for i in range(len(matrix) - 1)
    ]
    print_table(("layers", "NPIB", ""), rows)
    say(f"heatmap: {heatmap}")


def evaluate(
    model: Model,
    dataset: _Dataset = "builtin",
    path: _DatasetPath = None,
    num_samples: Annotated[int | None, typer.Option(help="At most this many sequences.")] = None,
    max_seq_length: _Length = 512,
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
    options.quiet_libraries()
    from mkaq.calibrate.text import documents
    from mkaq.calibrate.tokenizer import load_tokenizer
    from mkaq.calibrate.tokens import evaluation_sequences
    from mkaq.checkpoint.resolve import resolve_model
    from mkaq.checkpoint.validate import open_checkpoint
    from mkaq.evaluate.perplexity import perplexity
    from mkaq.evaluate.tasks import run_tasks
    from mkaq.progress import Progress
    from mkaq.stages.evaluate import PerplexitySection
    from mkaq.walk.device import compute_dtype, pick_device
    from mkaq.walk.walk import LayerWalk

    checkpoint, torch_device = open_checkpoint(resolve_model(model), quantized=True), pick_device(device)
    tokenizer, dtype = load_tokenizer(checkpoint.path), compute_dtype(checkpoint.dtype, torch_device)
    if tasks is not None:
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        scores = run_tasks(
            checkpoint, tokenizer, names, torch_device, dtype, limit=limit, include_path=include_path
        )
        _print_scores(model, scores, as_json=as_json)
        return
    values = {"dataset": dataset, "path": path, "num_samples": num_samples, "max_seq_length": max_seq_length}
    section = options.section(PerplexitySection, values)
    texts = documents(section.dataset, section.path, "evaluate")
    sequences = evaluation_sequences(texts, tokenizer, max_seq_length, num_samples)
    measured = perplexity(LayerWalk(checkpoint, torch_device, dtype), sequences, Progress())
    _print_perplexity(model, measured, section, as_json=as_json)


def _print_scores(model: str, scores: dict[str, dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print_json({"model": model, "tasks": scores})
        return
    rows = [
        (task, name, f"{value:.4f}") for task, metrics in scores.items() for name, value in metrics.items()
    ]
    print_table(("task", "metric", "value"), rows)


def _print_perplexity(
    model: str, measured: "Perplexity", section: "PerplexitySection", *, as_json: bool
) -> None:
    from mkaq.report import with_error

    if as_json:
        settings = section.model_dump(mode="json")
        print_json({"model": model, "perplexity": measured.as_json(), "settings": settings})
        return
    value = with_error(measured.perplexity, measured.standard_error, 4)
    say(f"perplexity: {value} ({measured.tokens:,} tokens)")


def bench(
    model: Model,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Measure this too, such as the source.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, max=512, help="Tokens that are read.")] = 256,
    new_tokens: Annotated[int, typer.Option(min=1, max=500, help="Tokens that are written.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Medians of so many runs count.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Measure speed, memory and bytes in each runtime that is installed beside mkaq."""
    options.quiet_libraries()
    import torch

    from mkaq.bench.measure import Load, speeds
    from mkaq.report import SPEED_HEADER, add_speeds, speed_row
    from mkaq.run.log import LOG

    load = Load(prompt_tokens, new_tokens, repeats, torch.get_num_threads())
    called, cuda, rows = [each for each in (model, against) if each], torch.cuda.is_available(), []
    paths = [_file_or_folder(each) for each in called]
    for row in (row for pair in zip(called, paths, strict=True) for row in speeds(*pair, load, cuda=cuda)):
        say(f"{row.runtime}: {row.reason or 'measured'} ({row.model})", error=True)
        rows.append(row)
    if all(row.reason for row in rows):
        fix = "install one beside mkaq, as said above; a recipe's export.formats decides which take it"
        raise UsageError("no runtime here takes it", where=model, fix=fix)
    measured: dict[str, Any] = {"settings": vars(load), "rows": [vars(row) for row in rows]}
    if (run := paths[0].parent).joinpath("report.html").is_file() and (run / LOG).is_file():
        add_speeds(run, measured)
    if as_json:
        print_json(measured)
        return
    print_table(SPEED_HEADER, [speed_row(row) for row in measured["rows"] if not row["reason"]])
    say(f"{prompt_tokens} tokens read, {new_tokens} written, median of {repeats}, {load.threads} threads")


def _file_or_folder(model: str) -> Path:
    from mkaq.checkpoint.resolve import resolve_model

    path = Path(model)
    return path if path.suffix == ".gguf" and path.is_file() else resolve_model(model)
