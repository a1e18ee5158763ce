"""Budgets through the command line: what fits a size or a perplexity, what is recorded, what is reused."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest

from mkaq import pipeline
from mkaq.manifest import MANIFEST, manifest_schema, read_manifest
from mkaq.recipe import Recipe
from mkaq.units import human
from tests.runs import Mkaq, Outcome, tree
from tests.tiny import PROTECT, write_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def budget(tmp_path: Path, tiny: Path, text: Path) -> Callable[..., Path]:
    """Writes a recipe with a budget; keyword arguments beside it replace whole sections."""

    def write(budget: dict[str, Any], **sections: Any) -> Path:
        plain: dict[str, Any] = {
            "calibration": {"dataset": "text", "path": str(text), "num_samples": 16, "max_seq_length": 32},
            "merge": PROTECT,
            "quantize": {"method": "gptq", "group_size": 32},
        }
        bits = {"bits": [8, 4]} if "quantize" not in sections else {}
        plain["budget"] = {**bits, **budget}
        return write_recipe(tmp_path / "recipe.yaml", tiny, text, **plain | sections)

    return write


@pytest.fixture
def options(mkaq: Mkaq) -> Callable[[Path], dict[tuple[int, int | None], int]]:
    """The options that `mkaq plan` tells: (layers removed, bits) -> bytes."""

    def ask(recipe: Path) -> dict[tuple[int, int | None], int]:
        outcome = mkaq("plan", recipe, "--json")
        assert outcome.code == 0, outcome.err
        rows = json.loads(outcome.out)["options"]
        return {(row["removed"], row["bits"]): row["bytes"] for row in rows}

    return ask


def tried(outcome: Outcome) -> int:
    return outcome.err.count("budget: trying ")


def made(outcome: Outcome) -> list[str]:
    """The stages that a run made anew, in order."""
    lines = [line.partition(": done in ") for line in outcome.err.splitlines()]
    return [stage for stage, done, _ in lines if done]


def times(folder: Path) -> dict[Path, int]:
    """When each file below a folder was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def record(folder: Path) -> Any:
    """The budget in the manifest, and that the run is the one that it names."""
    manifest = read_manifest(folder / "artifact")
    jsonschema.validate(json.loads((folder / "artifact" / MANIFEST).read_text()), manifest_schema())
    assert manifest.budget is not None and manifest.recipe["budget"] is None
    chosen = manifest.budget.chosen
    assert manifest.steps[-1].bytes_after == chosen.bytes
    assert manifest.source.layers - manifest.steps[-1].layers_after == chosen.removed
    if chosen.removed:
        assert manifest.recipe["merge"]["layers"] == chosen.removed
    else:
        assert manifest.recipe["merge"] is None
    if chosen.bits is not None:
        assert manifest.recipe["quantize"]["bits"] == chosen.bits
    return manifest.budget


def test_other_text_under_the_same_path_is_measured_anew(
    budget: Callable[..., Path], text: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    """Else the manifest would ship what the old text had given."""
    folder, own = tmp_path / "run", tmp_path / "own.txt"
    own.write_text(text.read_text())
    evaluate = {"perplexity": {"dataset": "text", "path": str(own), "num_samples": 2, "max_seq_length": 32}}
    calibration = {"dataset": "text", "path": str(own), "num_samples": 16, "max_seq_length": 32}
    recipe = budget({"perplexity_increase": "5000%"}, evaluate=evaluate, calibration=calibration)
    first = mkaq("run", recipe, "--output", folder)
    assert first.code == 0, first.err
    told = record(folder).tried
    own.write_text(text.read_text()[5000:])
    again = mkaq("run", recipe, "--output", folder)
    assert again.code == 0, again.err
    assert sorted(made(again)) == sorted(made(first))
    tried_again = record(folder).tried
    assert not {row.perplexity for row in told} & {row.perplexity for row in tried_again}
    manifest = read_manifest(folder / "artifact")
    last = manifest.evaluation[manifest.steps[-1].step]["perplexity"]["perplexity"]
    chosen = manifest.budget.chosen if manifest.budget else None
    assert chosen and last in {
        row.perplexity for row in tried_again if (row.removed, row.bits) == (chosen.removed, chosen.bits)
    }


def test_plan_tells_the_options_and_changes_nothing(
    budget: Callable[..., Path], mkaq: Mkaq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = budget({"bytes": "1MB"})
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    planned = json.loads(mkaq("plan", recipe, "--json").out)
    assert [(row["removed"], row["bits"]) for row in planned["options"]] == [
        (removed, bits) for bits in (8, 4) for removed in (0, 1, 2)
    ]
    for bits in (8, 4):
        sizes = [row["bytes"] for row in planned["options"] if row["bits"] == bits]
        assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    assert [stage["stage"] for stage in planned["stages"]] == ["source", "quantize"]
    assert planned["stages"][-1]["bytes"] == max(row["bytes"] for row in planned["options"])
    table = mkaq("plan", recipe).out.splitlines()
    for row, line in zip(planned["options"], table[1:7], strict=True):
        assert line.split()[:2] == [str(row["removed"]), str(row["bits"])] and human(row["bytes"]) in line
    assert "the run tries these against the budget" in table[7]
    assert tree(tmp_path) == before


def test_size_without_quantization_forces_the_layers(
    budget: Callable[..., Path], options: Any, mkaq: Mkaq, tmp_path: Path
) -> None:
    """Just enough for one layer less, and a byte too few: nothing has to be tried."""
    recipe, folder = budget({"bytes": "1GB"}, quantize=None), tmp_path / "run"
    sizes = options(recipe)
    assert sizes.keys() == {(1, None), (2, None)}
    for limit, removed in ((sizes[1, None], 1), (sizes[1, None] - 1, 2)):
        outcome = mkaq("run", budget({"bytes": f"{limit}B"}, quantize=None), "--output", folder)
        assert outcome.code == 0, outcome.err
        assert tried(outcome) == 0
        found = record(folder)
        assert (found.chosen.removed, found.tried, found.target["bytes"]) == (removed, [], f"{limit}B")
        assert mkaq("verify", folder / "artifact").code == 0
    assert "chosen: 2 layers removed" in mkaq("inspect", folder / "artifact").out


def test_size_is_met_by_layers_or_bits_whichever_costs_less(
    budget: Callable[..., Path], options: Any, mkaq: Mkaq, tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    sizes = options(budget({"bytes": "1GB"}))
    assert sizes[0, 4] < sizes[1, 8]
    recipe = budget({"bytes": f"{sizes[1, 8]}"})
    outcome = mkaq("run", recipe, "--output", folder)
    assert outcome.code == 0, outcome.err
    found = record(folder)
    assert [(trial.removed, trial.bits) for trial in found.tried] == [(1, 8), (0, 4)]
    best = min(found.tried, key=lambda trial: trial.perplexity)
    assert (found.chosen.removed, found.chosen.bits) == (best.removed, best.bits)
    assert all(trial.bytes == sizes[trial.removed, trial.bits] for trial in found.tried)
    measured = read_manifest(folder / "artifact").evaluation["quantize"]["perplexity"]["perplexity"]
    assert measured == best.perplexity
    verified = mkaq("verify", folder / "artifact", "--source", tiny)
    assert verified.code == 0, verified.err


def test_second_run_makes_nothing_anew(
    budget: Callable[..., Path], mkaq: Mkaq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generous rise takes the smallest; what was measured once is only looked up."""
    recipe, folder = budget({"perplexity_increase": "1000%"}), tmp_path / "run"
    outcome = mkaq("run", recipe, "--output", folder)
    assert outcome.code == 0, outcome.err
    found = record(folder)
    assert (found.chosen.removed, found.chosen.bits) == (2, 4)
    assert tried(outcome) == len(found.tried) >= 2
    stages = len(made(outcome)) + outcome.err.count("unchanged, kept")
    before, written = tree(folder / "artifact") | tree(folder / "store"), times(folder / "store")

    def again(*arguments: object) -> None:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr("mkaq.evaluate.perplexity.perplexity", again)
        outcome = mkaq("run", recipe, "--output", folder)
    assert outcome.code == 0, outcome.err
    assert not made(outcome) and outcome.err.count("unchanged, kept") == stages
    assert tree(folder / "artifact") | tree(folder / "store") == before
    assert times(folder / "store") == written and record(folder) == found


def handoff_of_a_trial(folder: Path) -> Path:
    """The handoff.json of a quantization that was tried, and not chosen."""
    chosen = (folder / "quantize").resolve()
    return next(path for path in folder.glob("store/quantize-*/handoff.json") if path.parent != chosen)


def test_damaged_trial_is_named(budget: Callable[..., Path], mkaq: Mkaq, tmp_path: Path) -> None:
    recipe, folder = budget({"perplexity_increase": "1000%"}), tmp_path / "run"
    assert mkaq("run", recipe, "--output", folder).code == 0
    before, handoff = tree(folder / "artifact"), handoff_of_a_trial(folder)
    handoff.write_text("{")
    outcome = mkaq("run", recipe, "--output", folder)
    assert outcome.code == 5 and f"{handoff}: the handoff is damaged" in outcome.err
    assert "fix: delete it, or use --fresh" in outcome.err
    assert tree(folder / "artifact") == before
    handoff.unlink()
    outcome = mkaq("run", recipe, "--output", folder)
    assert outcome.code == 0 and made(outcome) == ["quantize"], outcome.err
    assert tree(folder / "artifact") == before


@pytest.mark.parametrize("size", [0, 300])
def test_trial_that_a_power_cut_has_blanked_is_run_again(
    size: int, budget: Callable[..., Path], mkaq: Mkaq, tmp_path: Path
) -> None:
    recipe, folder = budget({"perplexity_increase": "1000%"}), tmp_path / "run"
    assert mkaq("run", recipe, "--output", folder).code == 0
    before, handoff = tree(folder / "artifact") | tree(folder / "store"), handoff_of_a_trial(folder)
    handoff.write_bytes(b"\0" * size)
    outcome = mkaq("run", recipe, "--output", folder)
    assert outcome.code == 0 and made(outcome) == ["quantize"], outcome.err
    assert f"{handoff} is blank, as after a power cut: quantize is made again" in outcome.err
    assert tree(folder / "artifact") | tree(folder / "store") == before


@pytest.mark.parametrize("target", ["mkaq.pipeline.make", "mkaq.quantize.gptq_layers.quantize_gptq"])
def test_interrupted_search_goes_on_where_it_was(
    target: str, budget: Callable[..., Path], mkaq: Mkaq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = budget({"perplexity_increase": "1000%"}), tmp_path / "run"
    module, _, name = target.rpartition(".")
    original, calls = getattr(__import__(module, fromlist=[name]), name), []

    def stop_at_the_second(*arguments: Any) -> Any:
        if calls:
            raise KeyboardInterrupt
        calls.append(arguments)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(target, stop_at_the_second)
        stopped = mkaq("run", recipe, "--output", folder)
    assert stopped.code == 75 and tried(stopped) == 2, stopped.err
    known = tree(folder / "store")
    assert not (folder / "artifact").exists()
    outcome = mkaq("run", recipe, "--output", folder)
    assert outcome.code == 0, outcome.err
    first = outcome.err.split("budget: trying ")[1]
    assert "done in" not in first and first.count("unchanged, kept") >= 3
    assert known.items() <= tree(folder / "store").items()
    assert tried(outcome) == len(record(folder).tried)
    stages = [path.name.partition("-")[0] for path in (folder / "store").iterdir()]
    all_made = [stage.partition("/")[0] for stage in made(stopped) + made(outcome)]
    assert sorted(all_made) == sorted([*stages, "artifact"])  # each once


def test_rise_that_nothing_meets(
    budget: Callable[..., Path], mkaq: Mkaq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worse(settled: Recipe, *_: object) -> Any:
        assert settled.quantize is not None
        found = {"source": 10.0, "quantize": 10 + 1 / settled.quantize.bits}
        evaluation = {stage: {"perplexity": {"perplexity": value}} for stage, value in found.items()}
        return SimpleNamespace(evaluation=evaluation, last="quantize")

    monkeypatch.setattr(pipeline, "make", worse)
    outcome = mkaq("run", budget({"perplexity_increase": "1%"}), "--output", tmp_path / "run")
    assert outcome.code == 2 and outcome.out == ""
    assert "budget.perplexity_increase: nothing keeps the rise of perplexity at 1.00% or less" in outcome.err
    assert "the best that was tried is 1.25% (" in outcome.err and "8 bits" in outcome.err
    assert not (tmp_path / "run" / "artifact").exists()


def test_size_that_nothing_meets(
    budget: Callable[..., Path], options: Any, mkaq: Mkaq, tmp_path: Path
) -> None:
    recipe, folder = budget({"bytes": "1KB"}), tmp_path / "run"
    smallest = options(recipe)[2, 4]
    outcome = mkaq("run", recipe, "--output", folder)
    assert outcome.code == 2 and outcome.out == ""
    told = f"nothing fits into 1,000 bytes: the smallest has {smallest:,} (2 layers removed, 4 bits, "
    assert told in outcome.err and "fix: allow more bytes, fewer bits" in outcome.err
    assert "Traceback" not in outcome.err
    assert not any((folder / name).exists() for name in ("store", "merge", "artifact"))


@pytest.mark.parametrize("merge", [None, {"fuse": "channels", "order": "measured"}])
def test_budget_of_bits_alone_or_with_fusing(
    merge: dict[str, Any] | None,
    budget: Callable[..., Path],
    options: Any,
    mkaq: Mkaq,
    tiny: Path,
    tmp_path: Path,
) -> None:
    sections = {"merge": merge and {**merge, "protect": {"first": 1, "last": 1}}}
    if merge:
        sections["recover"] = {"method": "layerwise", "steps": 5, "batch_size": 4}
    sizes = options(budget({"bytes": "1GB"}, **sections))
    assert set(sizes) == {(removed, bits) for bits in (8, 4) for removed in ((0, 1) if merge else (0,))}
    smallest = min(sizes.values())
    outcome = mkaq("run", budget({"bytes": f"{smallest}"}, **sections), "--output", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    chosen = record(tmp_path / "run").chosen
    assert (chosen.removed, chosen.bits) == (1 if merge else 0, 4)
    kinds = [step.step for step in read_manifest(tmp_path / "run" / "artifact").steps]
    assert kinds == (["merge", "recover", "quantize"] if merge else ["quantize"])
    verified = mkaq("verify", tmp_path / "run" / "artifact", "--source", tiny)
    assert verified.code == 0, verified.err
