"""Budgets through the command line: what fits a size or a perplexity, what is recorded, what is reused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from mkaq.export.manifest import MANIFEST, manifest_schema, read_manifest
from mkaq.recipe import Recipe
from mkaq.run.budget import Trials
from mkaq.units import human
from tests.runs import Mkaq, Outcome, tree
from tests.tiny import write_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def budget(tmp_path: Path, tiny: Path, text: Path) -> Callable[..., Path]:
    """Writes a recipe with a budget; keyword arguments beside it replace whole sections."""

    def write(budget: dict[str, Any], **sections: Any) -> Path:
        plain: dict[str, Any] = {
            "calibration": {"dataset": "text", "path": str(text), "num_samples": 16, "max_seq_length": 32},
            "merge": {"protect": {"first": 1, "last": 0}, "manifold": {"points": 128}},
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
    """Trials were once kept by path, and the manifest shipped what the old text had given."""
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


def test_second_run_reuses_the_trials(
    budget: Callable[..., Path], mkaq: Mkaq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generous rise takes the smallest; what was measured once is only looked up."""
    recipe, folder = budget({"perplexity_increase": "1000%"}), tmp_path / "run"
    outcome = mkaq("run", recipe, "--output", folder)
    assert outcome.code == 0, outcome.err
    found = record(folder)
    assert (found.chosen.removed, found.chosen.bits) == (2, 4)
    assert tried(outcome) == len(found.tried) >= 2
    before, known = tree(folder / "artifact"), (folder / "budget.json").read_bytes()
    assert len(json.loads(known)) == len(found.tried)

    def again(*arguments: object) -> None:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr("mkaq.stages.perplexity", again)
        outcome = mkaq("run", recipe, "--output", folder)
    assert outcome.code == 0, outcome.err
    assert "done in" not in outcome.err and outcome.err.count("unchanged, kept") == 7
    assert tree(folder / "artifact") == before and (folder / "budget.json").read_bytes() == known

    (folder / "budget.json").write_text("{")
    outcome = mkaq("run", recipe, "--output", folder)
    assert outcome.code == 5 and "budget.json: is damaged" in outcome.err and "delete it" in outcome.err
    assert tree(folder / "artifact") == before


def test_interrupted_search_goes_on_where_it_was(
    budget: Callable[..., Path], mkaq: Mkaq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = budget({"perplexity_increase": "1000%"}), tmp_path / "run"
    original, calls = Trials.__call__, []

    def stop_after_the_first(self: Trials, settled: Any) -> tuple[float, float]:
        if calls:
            raise KeyboardInterrupt
        calls.append(settled)
        return original(self, settled)

    with monkeypatch.context() as patch:
        patch.setattr(Trials, "__call__", stop_after_the_first)
        assert mkaq("run", recipe, "--output", folder).code == 75
    known = json.loads((folder / "budget.json").read_text())
    assert len(known) == 1 and not (folder / "artifact").exists()
    assert mkaq("run", recipe, "--output", folder).code == 0
    after = json.loads((folder / "budget.json").read_text())
    assert known.items() <= after.items() and len(after) == len(record(folder).tried)


def test_rise_that_nothing_meets(
    budget: Callable[..., Path], mkaq: Mkaq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worse(self: Trials, settled: Recipe) -> tuple[float, float]:
        assert settled.quantize is not None
        return 10.0 + 1 / settled.quantize.bits, 10.0

    monkeypatch.setattr(Trials, "__call__", worse)
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
    assert not (folder / "merge").exists() and not (folder / "artifact").exists()


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
