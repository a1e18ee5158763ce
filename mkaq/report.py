"""A run's report.html, and the summary table."""

import base64
import json
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from safetensors.numpy import load_file

from mkaq.drawings import curves_png, heatmap_png
from mkaq.files import replace_json
from mkaq.manifest import read_manifest
from mkaq.pipeline import stage_of
from mkaq.result import RunResult
from mkaq.run.estimate import ModelSize
from mkaq.run.quality import quality_lines
from mkaq.units import decimal, human

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ m.name }} - mkaq</title>
<style>
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.3rem .8rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%}code{background:#f4f4f4;padding:0 .2rem}
</style>
<h1>{{ m.name }}</h1>
<p>{{ m.source.path }} ({{ m.source.model_type }}), by mkaq {{ m.mkaq_version }}.</p>
<table><tr><th>stage<th>layers<th>parameters<th>bytes<th>perplexity<th>how</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}{% endfor %}</tr>
{% endfor %}</table>
{% for line in quality %}<p><b>{{ line }}</b></p>{% endfor %}
{% if m.budget %}<h2>Budget</h2>
<table><tr><th>layers removed<th>bits<th>bytes<th>perplexity</tr>
{% for x in m.budget.tried %}<tr><td>{{ x.removed }}<td>{{ x.bits or "-" }}<td>{{ x.bytes }}<td>{{ decimal(x.perplexity) }}</tr>
{% endfor %}</table>{% endif %}
{% if heatmap %}<h2>Layer similarity (NPIB)</h2><img alt="heatmap" src="{{ heatmap }}">{% endif %}
{% for step in steps %}{% for table in step.tables %}<h2>{{ table.title }}</h2>
{% if draw and table.curves %}<img alt="curves" src="{{ draw(table.curves) }}">{% endif %}
<table><tr>{% for cell in table.header %}<th>{{ cell }}{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}{% endfor %}</tr>
{% endfor %}</table>{% endfor %}
{% for line in step.lines %}<p>{{ line }}</p>{% endfor %}
{% endfor %}
{{ speed }}
<h2>Times</h2>
<table><tr><th>stage<th>seconds<th></tr>
{% for x in log %}<tr><td>{{ x.stage }}<td>{{ "-" if x.made_seconds is none else "%.1f"|format(x.made_seconds) }}<td>{{ "kept from an earlier run" if x.reused else "" }}</tr>
{% endfor %}</table>
<h2>Recipe</h2><pre>{{ recipe }}</pre>
</html>
"""

_SPEED = """<!-- speed -->{% if rows %}<h2>Speed</h2>
<table><tr>{% for cell in header %}<th>{{ cell }}{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}{% endfor %}</tr>
{% endfor %}</table>{% endif %}<!-- /speed -->"""
SPEED_HEADER = ("model", "runtime", "format", "bytes", "load", "read tokens/s", "write tokens/s", "memory")
SPEEDS = "bench.json"  # in the run's folder: what `mkaq bench` measured of its artifact


def table_rows(
    sizes: list[ModelSize], evaluation: dict[str, Any]
) -> list[tuple[str, str, str, str, str, str]]:
    """Stage, layers, parameters, bytes, perplexity, and how it was made, as text."""
    rows = []
    for size in sizes:
        measured = evaluation.get(size.stage, {}).get("perplexity")
        perplexity = with_error(measured["perplexity"], measured["standard_error"], 2) if measured else "-"
        weights = f"{size.parameters:,}", human(size.bytes)
        rows.append((size.stage, str(size.layers), *weights, perplexity, size.how))
    return rows


def with_error(value: float | None, error: float | None, digits: int) -> str:
    """A measured value, None if it is not finite, with its standard error, if there is one."""
    return decimal(value, digits) + (f" ± {error:.{digits}f}" if error is not None else "")


def write_report(result: RunResult, log: list[dict[str, Any]], similarity: Path | None) -> None:
    """Writes report.html into the run's folder: a single file that loads nothing else.

    Without matplotlib it has no drawings.

    Args:
        result: The result of the run.
        log: The stages made, and their times.
        similarity: The file with the similarity of layers, if there is one.
    """
    assert result.artifact is not None
    folder, heatmap, drawn = result.folder, "", find_spec("matplotlib")
    manifest = read_manifest(result.artifact)
    if similarity is not None and similarity.is_file() and drawn:
        heatmap = _embedded(heatmap_png(load_file(similarity)["npib"]))
    page = (
        jinja2.Environment(autoescape=True)
        .from_string(_PAGE)
        .render(
            m=manifest,
            rows=table_rows(result.sizes, result.evaluation),
            steps=[stage_of(step.step).describe(step) for step in manifest.steps],
            quality=list(quality_lines(manifest.fallbacks, manifest.evaluation)),
            decimal=decimal,
            heatmap=heatmap,
            draw=drawn and (lambda curves: _embedded(curves_png(curves))),
            speed=Markup(_speed_section(folder)),
            log=log,
            recipe=json.dumps(manifest.recipe, indent=2),
        )
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


def _embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def speed_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A measured `Speed` as text, a cell for each of `SPEED_HEADER`."""
    speed = f"{row['prefill_tokens_per_second']:.1f}", f"{row['decode_tokens_per_second']:.1f}"
    where = row["model"], row["runtime"], row["format"], human(row["bytes"])
    return (*where, f"{row['load_seconds']:.1f} s", *speed, human(row["peak_memory_bytes"]))


def add_speeds(folder: Path, measured: Mapping[str, Any]) -> None:
    """Keeps what `mkaq bench` measured in a run's folder, and shows it in the report.

    Args:
        folder: The run's folder, with a report.html.
        measured: What `mkaq bench --json` prints.
    """
    replace_json(folder / SPEEDS, measured)
    page, report = folder / "report.html", (folder / "report.html").read_text(encoding="utf-8")
    before, mark, rest = report.partition("<!-- speed -->")
    after = rest.partition("<!-- /speed -->")[2]
    if mark:
        page.write_text(before + _speed_section(folder) + after, encoding="utf-8")


def _speed_section(folder: Path) -> str:
    """The report's section on speed; empty but for its marks if nothing was measured."""
    shown: list[tuple[str, ...]] = []
    with suppress(OSError, ValueError, LookupError, TypeError):  # none, or not what `mkaq bench` wrote
        rows = json.loads((folder / SPEEDS).read_text())["rows"]
        shown = [speed_row(row) for row in rows if not row["reason"]]
    return jinja2.Environment(autoescape=True).from_string(_SPEED).render(header=SPEED_HEADER, rows=shown)
