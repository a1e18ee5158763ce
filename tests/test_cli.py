"""The commands, as a user types them: what they print and what they change."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from safetensors.torch import load_file

from mkaq import __version__
from mkaq.manifest import MANIFEST, manifest_schema, read_manifest
from mkaq.recipe import Recipe
from mkaq.recipe_file import load_recipe
from tests.runs import MAIN, ROOT, STAGES, Mkaq, command, told, tree
from tests.tiny import edit_config, make_model, write_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))


def mkaq_then(check: str) -> list[str]:
    """The command line up to its arguments, in another process, which makes a check at its end."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\ntry:\n {MAIN}\nfinally:\n {check}"
    return [sys.executable, "-c", code]


def child_seconds() -> float:
    """Processor time of child processes that have ended: the machine may be busy with something else."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_and_version_are_instant() -> None:
    line = mkaq_then("assert not {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)")
    taken = []
    for arguments, expected in {
        ("--help",): "Commands",
        ("run", "--help"): "--until",
        ("--version",): __version__,
    }.items():
        began = child_seconds()
        told = subprocess.run([*line, *arguments], capture_output=True, text=True)
        taken.append(child_seconds() - began)
        assert (told.returncode, told.stderr) == (0, "")
        assert expected in told.stdout
    assert min(taken) < 0.5  # the quickest: on a busy machine a process is slowed down by its neighbours


def test_until_takes_the_names_of_the_stages() -> None:
    from mkaq import pipeline
    from mkaq.cli import run

    assert [*(stage.NAME for stage in pipeline.STAGES), pipeline.LAST] == list(run._UNTIL)


@pytest.mark.parametrize("name", ["recipes", "schema", "clean"])
def test_commands_that_run_no_model_do_not_load_torch(name: str, copy: Path) -> None:
    line = mkaq_then("assert not {'torch', 'transformers'} & set(sys.modules)")
    folder = [copy] if name == "clean" else []
    told = subprocess.run([*line, name, *folder], capture_output=True, text=True)
    assert (told.returncode, told.stderr) == (0, "")


def test_commands_that_quantize_nothing_do_not_load_the_compiler(plain: Path) -> None:
    line = mkaq_then("assert 'mkaq.budget' in sys.modules and 'numba' not in sys.modules")
    told = subprocess.run([*line, "plan", str(plain)], capture_output=True, text=True)
    assert (told.returncode, told.stderr) == (0, "")


def test_help_names_every_command(mkaq: Mkaq) -> None:
    text = mkaq("--help").out
    for name in (
        "run",
        "plan",
        "analyze",
        "inspect",
        "verify",
        "eval",
        "generate",
        "chat",
        "clean",
        "recipes",
        "schema",
    ):
        assert f"\n  {name} " in text
        assert "Usage" in mkaq(name, "--help").out


def test_two_runs_from_scratch_are_byte_identical(done: Path, plain: Path, tmp_path: Path) -> None:
    """In another process and folder; and `--json` leaves nothing but JSON on stdout."""
    (tmp_path / "elsewhere").mkdir()
    line = command("run", plain, "--output", "here", "--json")
    outcome = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path / "elsewhere")
    assert outcome.returncode == 0, outcome.stderr
    result = json.loads(outcome.stdout)
    folder = tmp_path / "elsewhere" / "here"
    assert (result["run"], result["artifact"]) == ("here", "here/artifact")
    assert tree(folder / "artifact") == tree(done / "artifact")
    for stage in STAGES:
        assert tree(folder / stage) == tree(done / stage), stage
    assert [stage["stage"] for stage in result["stages"]] == ["source", "merge", "quantize"]
    assert [stage["layers"] for stage in result["stages"]] == [3, 2, 2]
    manifest = read_manifest(done / "artifact")
    for stage in result["stages"]:
        assert stage["perplexity"] == manifest.evaluation[stage["stage"]]["perplexity"]


def test_run_prints_a_table_and_where_the_artifact_is(
    plain: Path, copy: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    outcome = mkaq("run", plain, "--output", copy)
    header, *rows, last = outcome.out.splitlines()
    rows, runs = rows[:3], rows[3:]
    assert header.split()[:3] == ["stage", "layers", "parameters"]
    assert runs[0] == "runs in: transformers on a CPU, vLLM, vLLM on a CPU, ONNX Runtime GenAI"
    assert runs[1].startswith("MLX: no, because ") and len(runs) == 4
    assert [row.split()[0] for row in rows] == ["source", "merge", "quantize"]
    assert all("±" in row for row in rows)
    assert [row.split("  ")[-1].strip() for row in (header, *rows[1:])] == [
        "how",
        "average, similarity",
        "gptq, 4 bits, group_size 32",
    ]
    assert last == f"artifact: {copy / 'artifact'}"
    assert (copy / "report.html").stat().st_size > 5000
    log = json.loads((copy / "run.json").read_text())
    assert [row["stage"] for row in log["stages"]] == STAGES and log["peak_memory_bytes"] > 10**8


def test_second_run_reuses_everything(plain: Path, copy: Path, mkaq: Mkaq) -> None:
    before = {stage: tree(copy / stage) for stage in STAGES}
    took = [row["seconds"] for row in json.loads((copy / "run.json").read_text())["stages"]]
    times = {p: p.stat().st_mtime_ns for stage in STAGES for p in (copy / stage).rglob("*") if p.is_file()}
    outcome = mkaq("run", plain, "--output", copy)
    assert told(outcome) == dict.fromkeys(STAGES, True)
    assert {stage: tree(copy / stage) for stage in STAGES} == before
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert [row["made_seconds"] for row in json.loads((copy / "run.json").read_text())["stages"]] == took


def test_fresh_run_makes_every_stage_again(plain: Path, done: Path, copy: Path, mkaq: Mkaq) -> None:
    outcome = mkaq("run", plain, "--output", copy, "--fresh")
    assert told(outcome) == dict.fromkeys(STAGES, False)
    assert tree(copy / "artifact") == tree(done / "artifact")


def test_damaged_stage_is_made_again(plain: Path, done: Path, copy: Path, mkaq: Mkaq) -> None:
    weights = copy / "merge" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    outcome = mkaq("run", plain, "--output", copy)
    assert told(outcome) == {stage: stage != "merge" for stage in STAGES}
    assert tree(copy / "merge") == tree(done / "merge")


def test_run_until_a_stage_stops_there_and_goes_on(
    plain: Path, done: Path, tmp_path: Path, mkaq: Mkaq
) -> None:
    folder, until = tmp_path / "run", {"calibrate": 2, "analyze": 3, "merge": 5, "quantize": 7}
    kept = 0
    for stage, count in until.items():
        outcome = mkaq("run", plain, "--output", folder, "--until", stage)
        assert outcome.code == 0 and outcome.out.splitlines()[-1] == f"stopped after {stage}: {folder}"
        assert told(outcome) == {name: n < kept for n, name in enumerate(STAGES[:count])}
        assert [name for name in STAGES if (folder / name).exists()] == STAGES[:count]
        kept = count
    outcome = mkaq("run", plain, "--output", folder)
    assert told(outcome) == {name: name != "artifact" for name in STAGES}
    assert tree(folder / "artifact") == tree(done / "artifact")


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ("name=other", "artifact"),
        ("quantize.bits=8", "quantize"),
        ("merge.coefficient=0.25", "merge"),
        ("merge.manifold.points=64", "analyze"),
        ("calibration.num_samples=9", "calibrate"),
    ],
)
def test_changed_recipe_redoes_only_what_it_must(
    plain: Path, copy: Path, mkaq: Mkaq, change: str, first: str
) -> None:
    before = {stage: tree(copy / stage) for stage in STAGES}
    outcome = mkaq("run", plain, "--output", copy, "--set", change)
    redone = STAGES[STAGES.index(first) :]
    assert told(outcome) == {stage: stage not in redone for stage in STAGES}, outcome.err
    changed = [stage for stage in STAGES if tree(copy / stage) != before[stage]]
    assert changed == redone
    assert mkaq("verify", copy / "artifact").code == 0


def test_changed_measurement_redoes_measurements_only(plain: Path, copy: Path, mkaq: Mkaq) -> None:
    outcome = mkaq("run", plain, "--output", copy, "--set", "evaluate.perplexity.num_samples=3")
    kept = [stage for stage, kept in told(outcome).items() if kept]
    assert kept == ["calibrate", "analyze", "merge", "quantize"]


def test_changed_source_redoes_everything(
    copy: Path, model: Path, text: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    source = shutil.copytree(model, tmp_path / "model")
    recipe = write_recipe(tmp_path / "recipe.yaml", source, text)
    assert told(mkaq("run", recipe, "--output", copy)) == {stage: stage != "artifact" for stage in STAGES}
    edit_config(source, rms_norm_eps=1e-5)
    assert told(mkaq("run", recipe, "--output", copy)) == dict.fromkeys(STAGES, False)


MODELS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "vocab_size": 256},  # so that the quantized layers weigh most
    "qwen2": {"family": "qwen2"},  # biases
    "gemma2": {"family": "gemma2"},  # a tied head
}
BNB = {"calibration": None, "merge": None, "evaluate": None}
PLANS: dict[str, tuple[str, dict[str, Any]]] = {
    "merge to float32": ("gemma2", {"quantize": None, "model": {"dtype": "float32"}}),
    "gptq 3": ("gemma2", {"quantize": {"method": "gptq", "bits": 3, "group_size": -1}}),
    "gptq 8": ("qwen2", {"merge": None, "quantize": {"method": "gptq", "bits": 8, "group_size": 64}}),
    "int8": ("llama", {**BNB, "quantize": {"method": "bitsandbytes", "bits": 8}}),
    "nf4": ("llama", {**BNB, "quantize": {"method": "bitsandbytes"}}),
    "fp4": (
        "llama",
        {**BNB, "quantize": {"method": "bitsandbytes", "quant_type": "fp4", "double_quant": False}},
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: make_model(folder / name, layers=3, **options) for name, options in MODELS.items()}


@pytest.mark.parametrize("case", PLANS)
def test_plan_tells_the_sizes_that_the_run_then_has(
    case: str,
    models: dict[str, Path],
    text: Path,
    mkaq: Mkaq,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, sections = PLANS[case]
    sections = {**sections, "model": {"path": str(models[name]), **sections.get("model", {})}}
    recipe = write_recipe(tmp_path / "recipe.yaml", models[name], text, **sections)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    planned = json.loads(mkaq("plan", recipe, "--json").out)
    table = mkaq("plan", recipe).out
    assert sorted(tmp_path.rglob("*")) == before
    assert planned["run"] == "runs/test"
    for stage in planned["stages"]:
        assert f"{stage['parameters']:,}" in table

    outcome = mkaq("run", recipe, "--json")
    assert outcome.code == 0, outcome.err
    found = [{k: v for k, v in s.items() if k != "perplexity"} for s in json.loads(outcome.out)["stages"]]
    exact = "bitsandbytes" not in recipe.read_text()
    if exact:
        assert found == planned["stages"]
    else:
        assert [s | {"bytes": 0} for s in found] == [s | {"bytes": 0} for s in planned["stages"]]
        assert found[-1]["bytes"] == pytest.approx(planned["stages"][-1]["bytes"], rel=0.02)
    artifact = tmp_path / "runs" / "test" / "artifact"
    assert sum(t.nbytes for t in load_file(artifact / "model.safetensors").values()) == found[-1]["bytes"]
    assert sum(len(data) for data in tree(tmp_path / "runs").values()) < planned["disk_bytes"]
    jsonschema.validate(json.loads((artifact / MANIFEST).read_text()), manifest_schema())
    assert mkaq("verify", artifact, "--source", models[name]).code == 0


def test_plan_leaves_a_finished_run_alone(plain: Path, copy: Path, mkaq: Mkaq) -> None:
    before = tree(copy)
    planned = json.loads(mkaq("plan", plain, "--output", copy, "--set", "quantize.bits=8", "--json").out)
    assert planned["run"] == str(copy) and planned["memory_bytes"] > 0
    assert tree(copy) == before


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_recipes(path: Path) -> None:
    """Every recipe that ships loads, and its resolved form is the same recipe."""
    recipe = load_recipe(path)
    assert Recipe.model_validate(yaml.safe_load(recipe.to_yaml())) == recipe
    assert recipe.merge or recipe.quantize


def test_recipes_are_listed_with_what_they_are_for(mkaq: Mkaq) -> None:
    listed = json.loads(mkaq("recipes", "--json").out)
    assert [row["path"] for row in listed] == [str(path) for path in SHIPPED]
    text = mkaq("recipes").out
    for row in listed:
        assert row["name"] in text and row["about"] in text and row["path"] in text
        assert len(row["about"]) > 20


def test_shipped_recipe_is_found_by_its_name(
    mkaq: Mkaq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("tiny_llama_int4", "tiny_llama_int4.yaml", "recipes/tiny_llama_int4.yaml"):
        planned = json.loads(mkaq("plan", name, "--json").out)
        assert [stage["layers"] for stage in planned["stages"]] == [16, 9, 9]
    assert list(tmp_path.iterdir()) == []


def test_schema_accepts_the_shipped_recipes_and_refuses_faults(mkaq: Mkaq) -> None:
    schema = json.loads(mkaq("schema").out)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for path in SHIPPED:
        validator.validate(yaml.safe_load(path.read_text()))
    good = yaml.safe_load(SHIPPED[0].read_text())
    for fault in ({"merge": {"ration": 0.2}}, {"quantize": {"method": "gptq", "bits": 5}}, {"nam": "x"}):
        assert not validator.is_valid(good | fault)
    for part in [schema, *schema["$defs"].values()]:
        for key, value in part.get("properties", {}).items():
            assert value.get("description") or "$ref" in value, key


def test_inspect_shows_what_was_done(done: Path, mkaq: Mkaq) -> None:
    raw = json.loads((done / "artifact" / MANIFEST).read_text())
    assert json.loads(mkaq("inspect", done / "artifact", "--json").out) == raw
    jsonschema.Draft202012Validator.check_schema(manifest_schema())
    jsonschema.validate(raw, manifest_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(raw | {"more": 1}, manifest_schema())
    text = mkaq("inspect", done / "artifact").out
    assert text.startswith(f"test: made by mkaq {__version__} from ")
    merge, quantize = raw["steps"]
    for step in raw["steps"]:
        row = next(line for line in text.splitlines() if line.startswith(step["step"])).split()
        assert row[1:3] == [str(step["layers_after"]), f"{step['parameters_after']:,}"]
        perplexity = raw["evaluation"][step["step"]]["perplexity"]["perplexity"]
        assert row[-1] == f"{perplexity:.2f}"
    mixed = next(layer for layer in merge["layers"] if len(layer["from"]) == 2)
    (a, x), (b, y) = mixed["from"].items()
    assert f"layer {mixed['new']} = {x:.3f} x {a} + {y:.3f} x {b}" in text
    worst = max(quantize["modules"], key=lambda module: module["error"])
    assert f"gptq, 4 bits, 14 modules; largest output error {worst['error']:.2e} ({worst['name']})" in text


def test_model_card_is_one_that_hubs_read(done: Path) -> None:
    empty, front, body = (done / "artifact" / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(front)
    assert empty == "" and not {"base_model", "base_model_relation"} & card.keys()  # of a local folder
    assert card["library_name"] == "transformers" and {"mkaq", "gptq"} <= set(card["tags"])
    assert "# test\n" in body and "| quantize | 2 | " in body


def test_analyze_writes_a_heatmap(model: Path, text: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    png = tmp_path / "heat.png"
    options = ("--dataset", "text", "--path", text, "--num-samples", 8, "--max-seq-length", 32)
    outcome = mkaq("analyze", model, "--heatmap", png, *options)
    assert outcome.code == 0, outcome.err
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and png.stat().st_size > 5000
    matrix = json.loads(mkaq("analyze", model, "--heatmap", png, *options, "--json").out)["npib"]
    assert [len(row) for row in matrix] == [3, 3, 3]
    for first in range(2):
        assert matrix[first][first] == pytest.approx(1) and 0 <= matrix[first][first + 1] <= 1
        row = next(line for line in outcome.out.splitlines() if line.startswith(f"{first} - {first + 1} "))
        assert f"{matrix[first][first + 1]:.3f}" in row
    assert outcome.out.splitlines()[-1] == f"heatmap: {png}"


def test_eval_measures_what_the_run_measured(done: Path, model: Path, text: Path, mkaq: Mkaq) -> None:
    options = ("--dataset", "text", "--path", text, "--num-samples", 2, "--max-seq-length", 32)
    recorded = read_manifest(done / "artifact").evaluation
    for path, stage in ((model, "source"), (done / "artifact", "quantize")):
        measured = json.loads(mkaq("eval", path, *options, "--json").out)["perplexity"]
        expected = {k: v for k, v in recorded[stage]["perplexity"].items() if k != "settings"}
        assert measured == expected
        assert mkaq("eval", path, *options).out.startswith(f"perplexity: {measured['perplexity']:.4f} ±")


def test_generate_continues_the_prompt(done: Path, mkaq: Mkaq) -> None:
    artifact = done / "artifact"
    new = json.loads(mkaq("generate", artifact, "To be or", "--max-new-tokens", 5, "--json").out)
    assert new["prompt"] == "To be or" and 1 <= new["tokens"] <= 5 and new["text"]
    assert mkaq("generate", artifact, "To be or", "--max-new-tokens", 5).out == f"To be or{new['text']}\n"


def test_eval_refuses_options_that_it_would_not_read(mkaq: Mkaq, model: Path) -> None:
    for options in (("--limit", 3), ("--include-path", "x"), ("--tasks", "arc_easy", "--num-samples", 3)):
        outcome = mkaq("eval", model, *options)
        assert outcome.code == 2 and options[0] in outcome.err, outcome.err
