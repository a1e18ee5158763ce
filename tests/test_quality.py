"""What a run tells and refuses: fallbacks, and perplexities that show a broken model."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file

from mkaq.evaluate.perplexity import Perplexity
from mkaq.manifest import MANIFEST, manifest_schema, read_manifest
from mkaq.quantize.shortfall import clamped_scales, dead_columns
from tests.runs import STAGES, Mkaq, Outcome, forge, kept, one_message, told, tree
from tests.tiny import CHANNELS, PROTECT, write_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
QUANTIZED = ["calibrate", "quantize"]


@pytest.fixture
def singular(tmp_path: Path, model: Path, text: Path) -> Path:
    """A recipe with fewer tokens than columns, and almost no damping: no Hessian can be factorized."""
    calibration = {"dataset": "text", "path": str(text), "num_samples": 1, "max_seq_length": 32}
    quantize = {"method": "gptq", "bits": 4, "group_size": 32, "damp_percent": 1e-12}
    sections = {"merge": None, "calibration": calibration, "quantize": quantize, "evaluate": None}
    return write_recipe(tmp_path / "recipe.yaml", model, text, **sections)


@pytest.fixture
def damaged(tmp_path: Path, model: Path) -> Callable[[dict[str, Callable[[torch.Tensor], object]]], Path]:
    """A copy of the model with some tensors changed in place."""

    def make(edits: dict[str, Callable[[torch.Tensor], object]]) -> Path:
        folder = shutil.copytree(model, tmp_path / "model")
        tensors = load_file(folder / "model.safetensors")
        for name, edit in edits.items():
            edit(tensors[name])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.fixture
def perplexities(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[float]], None]:
    """Gives the next measurements these results."""

    def give(values: Sequence[float]) -> None:
        results = iter(values)
        monkeypatch.setattr(
            "mkaq.evaluate.perplexity.summarize", lambda *_: Perplexity(next(results), 0.1, 62, 2)
        )

    return give


def line_of(outcome: Outcome, beginning: str) -> str:
    """The only line of a command's output that begins so."""
    (line,) = [line for line in outcome.out.splitlines() if line.startswith(beginning)]
    return line


# --- fallbacks ---------------------------------------------------------------------------------


def test_fallback_is_told_everywhere(singular: Path, model: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    artifact = tmp_path / "run" / "artifact"
    outcome = mkaq("run", singular, "--output", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    manifest = read_manifest(artifact)
    raised = [m.name for m in manifest.steps[0].modules if m.damp_percent > 1e-12]
    assert len(raised) > 3
    words = f"damping raised in {len(raised)} modules ({', '.join(raised[:3])}, ...)"
    assert manifest.fallbacks == {"quantize": [words]}
    line = f"fallbacks: quantize: {words}"
    assert line_of(outcome, "fallbacks") == line
    assert line_of(mkaq("inspect", artifact), "fallbacks") == line
    assert f"**{line}**" in (artifact / "README.md").read_text()
    assert line in (tmp_path / "run" / "report.html").read_text()
    again = json.loads(mkaq("run", singular, "--output", tmp_path / "run", "--json").out)
    assert again["fallbacks"] == manifest.fallbacks
    jsonschema.validate(json.loads((artifact / MANIFEST).read_text()), manifest_schema())
    assert mkaq("verify", artifact, "--source", model).code == 0


def test_run_without_fallbacks_tells_none(done: Path, plain: Path, copy: Path, mkaq: Mkaq) -> None:
    assert read_manifest(done / "artifact").fallbacks == {}
    outcome = mkaq("run", plain, "--output", copy, "--strict")
    assert outcome.code == 0 and told(outcome) == dict.fromkeys(STAGES, True), outcome.err
    for text in (outcome.out, mkaq("inspect", copy / "artifact").out, (copy / "report.html").read_text()):
        assert "fallbacks: " not in text and "WARNING" not in text
    shown = json.loads(mkaq("run", plain, "--output", copy, "--json").out)
    assert (shown["fallbacks"], shown["warnings"]) == ({}, [])


@pytest.mark.parametrize("fallbacks", [{}, {"quantize": ["all is well"]}])
def test_forged_fallbacks(
    fallbacks: dict[str, list[str]], singular: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    assert mkaq("run", singular, "--output", tmp_path / "run").code == 0
    forge(tmp_path / "run" / "artifact", lambda manifest: manifest.update(fallbacks=fallbacks))
    outcome = mkaq("verify", tmp_path / "run" / "artifact")
    one_message(outcome, 5, "the fallbacks of the manifest are not those of its steps")


def test_strict_refuses_the_stage_and_keeps_it(singular: Path, copy: Path, mkaq: Mkaq) -> None:
    """Both when it is made and when it is found; without --strict the run goes on from there."""
    before, artifact = kept(copy), tree(copy / "artifact")
    words = ("--strict refuses fallbacks: quantize: damping raised in ", "fix: ", "store/quantize-")
    outcome = mkaq("run", singular, "--output", copy, "--strict")
    one_message(outcome, 5, *words)
    assert told(outcome) == dict.fromkeys(QUANTIZED, False)
    after = kept(copy)
    assert before.items() <= after.items() and tree(copy / "artifact") == artifact
    again = mkaq("run", singular, "--output", copy, "--strict")
    one_message(again, 5, *words)
    assert told(again) == dict.fromkeys(QUANTIZED, True) and kept(copy) == after
    outcome = mkaq("run", singular, "--output", copy)
    assert outcome.code == 0 and told(outcome) == {**dict.fromkeys(QUANTIZED, True), "artifact": False}
    assert line_of(outcome, "fallbacks").removeprefix("fallbacks: ") in again.err


def test_strict_refuses_before_a_later_stage(
    tiny: Path, text: Path, mkaq: Mkaq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of eight samples none can be spared to measure groups on others than those that build them."""
    recipe = write_recipe(tmp_path / "r.yaml", tiny, text, merge=CHANNELS, evaluate=None)
    outcome = mkaq("run", recipe, "--output", tmp_path / "run", "--strict")
    one_message(outcome, 5, "fallbacks: merge: groups measured on the samples they were built from")
    assert list(told(outcome)) == ["calibrate", "analyze", "merge"]
    more = ("--set", "calibration.num_samples=16", "--strict", "--until", "merge")
    outcome = mkaq("run", recipe, "--output", tmp_path / "run", *more)
    assert outcome.code == 0 and "fallbacks" not in outcome.out, outcome.err


EDITS: dict[str, tuple[dict[str, Callable[[torch.Tensor], object]], str | None]] = {
    "channel without input": (
        {"model.layers.1.mlp.up_proj.weight": lambda w: w[5].zero_()},
        "columns without input in 1 module (model.layers.1.mlp.down_proj)",
    ),
    "channel that is not there": (
        {
            "model.layers.1.mlp.up_proj.weight": lambda w: w[5].zero_(),
            "model.layers.1.mlp.down_proj.weight": lambda w: w[:, 5].zero_(),
        },
        None,
    ),
    "weights too small for float16": (
        {"model.layers.2.self_attn.q_proj.weight": lambda w: w[3].fill_(1e-8)},
        "scales beyond float16 in 1 module (model.layers.2.self_attn.q_proj)",
    ),
    "weights of 0": ({"model.layers.2.self_attn.q_proj.weight": lambda w: w[3].zero_()}, None),
}


@pytest.mark.parametrize("case", EDITS)
def test_what_gptq_cannot_round_as_it_should(
    case: str, damaged: Callable[..., Path], text: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    edits, words = EDITS[case]
    recipe = write_recipe(tmp_path / "r.yaml", damaged(edits), text, merge=None, evaluate=None)
    outcome = mkaq("run", recipe, "--output", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    expected = {"quantize": [words]} if words else {}
    assert read_manifest(tmp_path / "run" / "artifact").fallbacks == expected


def test_shortfalls_are_counted_where_there_are_weights() -> None:
    weight, hessian = torch.ones(3, 4), torch.eye(4)
    hessian[1, 1] = hessian[2, 2] = 0
    weight[:, 2] = 0
    assert dead_columns(weight, hessian) == 1
    scales, g_idx = (
        torch.tensor([[2.0**-24, 1.0], [65504.0, 2.0**-24], [1.0, 1.0]]),
        torch.tensor([0, 0, 1, 1]),
    )
    weight[1, 2:] = 0
    assert clamped_scales(weight, scales, g_idx) == 2


def test_one_sample_is_too_few_to_tune(tiny: Path, text: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    """It would be held out, and nothing learned."""
    recipe = write_recipe(tmp_path / "r.yaml", tiny, text, merge={"layers": 1, **PROTECT}, evaluate=None)
    tuned = ("--set", "recover={method: layerwise}", "--set", "calibration.num_samples=1")
    one_message(mkaq("run", recipe, "--output", tmp_path / "run", *tuned), 2, "num_samples", "at least 2")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.input_layernorm.weight"])
@pytest.mark.parametrize("method", ["gptq", "bitsandbytes"])
def test_weights_beyond_the_type_in_which_they_are_written(
    name: str, method: str, damaged: Callable[..., Path], text: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    model = damaged({name: lambda w: w[:1].fill_(1e6)})
    quantize = {"method": method, "bits": 8} | ({"group_size": 32} if method == "gptq" else {})
    recipe = write_recipe(tmp_path / "r.yaml", model, text, merge=None, quantize=quantize, evaluate=None)
    outcome = mkaq("run", recipe, "--output", tmp_path / "run", "--set", "model.dtype=float16")
    one_message(outcome, 3, f"model.dtype: {name} has values beyond float16")


# --- perplexities ------------------------------------------------------------------------------


def test_limit_is_told_after_the_stage_that_exceeds_it(
    plain: Path, copy: Path, mkaq: Mkaq, perplexities: Callable[[Sequence[float]], None]
) -> None:
    artifact, fresh = tree(copy / "artifact"), ("--set", "evaluate.perplexity.num_samples=3")
    perplexities([10.0, 20.0, 25.0])
    outcome = mkaq("run", plain, "--output", copy, *fresh, "--set", "evaluate.limit=2.0")
    words = "the perplexity after quantize is 25.00, 2.5 times the source's 10.00; the limit is 2 times"
    one_message(outcome, 5, f"evaluate.limit: {words}", "fix: merge less")
    assert list(told(outcome)) == STAGES[:-1] and tree(copy / "artifact") == artifact
    outcome = mkaq("run", plain, "--output", copy, *fresh, "--set", "evaluate.limit=1.5")
    one_message(outcome, 5, "after merge is 20.00, 2 times the source's 10.00; the limit is 1.5 times")
    assert told(outcome) == dict.fromkeys(STAGES[:5], True) and tree(copy / "artifact") == artifact
    outcome = mkaq("run", plain, "--output", copy, *fresh, "--set", "evaluate.limit=2.5")
    assert outcome.code == 0 and told(outcome) == {name: name != "artifact" for name in STAGES}
    assert read_manifest(copy / "artifact").recipe["evaluate"]["limit"] == 2.5


def test_limit_is_for_the_choice_of_a_budget_not_for_its_trials(
    model: Path,
    text: Path,
    mkaq: Mkaq,
    tmp_path: Path,
    perplexities: Callable[[Sequence[float]], None],
) -> None:
    evaluate = {"perplexity": {"dataset": "text", "path": str(text), "max_seq_length": 32, "num_samples": 2}}
    sections: dict[str, Any] = {
        "merge": None,
        "quantize": {"method": "gptq", "group_size": 32},
        "budget": {"bytes": "1GB", "bits": [8, 4]},
        "evaluate": {**evaluate, "limit": 2.0},
    }
    recipe = write_recipe(tmp_path / "r.yaml", model, text, **sections)
    perplexities([10.0, 30.0, 12.0])  # the source, then with 8 bits, then with 4
    outcome = mkaq("run", recipe, "--output", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    perplexities([10.0, 30.0, 22.0])
    outcome = mkaq("run", recipe, "--output", tmp_path / "run", "--fresh")
    one_message(outcome, 5, "after quantize is 22.00, 2.2 times the source's 10.00")


@pytest.mark.parametrize(
    ("values", "warned"),
    [
        ((10.0, 99.0, 12.0), {}),
        ((10.0, 100.0, 12.0), {"merge": "is 100.00, 10 times the source's 10.00"}),
        (
            (10.0, 5e12, 110.0),
            {"merge": "is 5e+12, 5e+11 times the", "quantize": "is 110.00, 11 times the source's 10.00"},
        ),
        ((10.0, 11.0, float("inf")), {"quantize": "is not finite, the source's is 10.00"}),
    ],
)
def test_broken_model_is_warned_of(
    values: tuple[float, ...],
    warned: dict[str, str],
    plain: Path,
    copy: Path,
    mkaq: Mkaq,
    perplexities: Callable[[Sequence[float]], None],
) -> None:
    perplexities(values)
    outcome = mkaq("run", plain, "--output", copy, "--set", "evaluate.perplexity.num_samples=3")
    assert outcome.code == 0, outcome.err
    card, report = ((copy / name).read_text() for name in ("artifact/README.md", "report.html"))
    inspected = mkaq("inspect", copy / "artifact").out
    for text in (outcome.out, inspected, card, report):
        assert text.count("WARNING: ") == len(warned)
    for stage, words in warned.items():
        line = line_of(outcome, f"WARNING: the perplexity after {stage} {words}")
        assert line.endswith(": do not ship this model")
        assert line in inspected and f"**{line}**" in card


def test_perplexity_that_is_not_finite(
    damaged: Callable[..., Path], text: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    """Weights near the largest number of bfloat16: every logit overflows."""
    model = damaged({"lm_head.weight": lambda w: w.sign_().mul_(3e38)})
    recipe, folder = write_recipe(tmp_path / "r.yaml", model, text), tmp_path / "run"
    one_message(
        mkaq("run", recipe, "--output", folder, "--set", "evaluate.limit=1000"),
        5,
        "the perplexity after merge is not finite, the source's is not finite; the limit is 1000 times",
    )
    outcome = mkaq("run", recipe, "--output", folder, "--json")
    assert outcome.code == 0, outcome.err
    shown = json.loads(outcome.out, parse_constant=lambda name: pytest.fail(name))
    assert [row["perplexity"]["perplexity"] for row in shown["stages"]] == [None] * 3
    assert len(shown["warnings"]) == 2
    manifest = read_manifest(folder / "artifact")
    assert manifest.evaluation["merge"]["perplexity"]["perplexity"] is None
    assert "not finite" in line_of(mkaq("inspect", folder / "artifact"), "quantize ")
    assert "| not finite |" in (folder / "artifact" / "README.md").read_text()
    options = ("--dataset", "text", "--path", text, "--num-samples", 2, "--max-seq-length", 32)
    assert mkaq("eval", model, *options).out.startswith("perplexity: not finite (")


def test_budget_of_a_perplexity_that_is_not_finite(
    model: Path, text: Path, mkaq: Mkaq, tmp_path: Path, perplexities: Callable[[Sequence[float]], None]
) -> None:
    sections: dict[str, Any] = {"merge": None, "quantize": {"method": "gptq", "group_size": 32}}
    recipe = write_recipe(
        tmp_path / "r.yaml", model, text, **sections, budget={"bytes": "1GB", "bits": [8, 4]}
    )
    perplexities([10.0, float("inf"), 12.0])
    outcome = mkaq("run", recipe, "--output", tmp_path / "run")
    assert outcome.code == 0 and "budget: perplexity not finite, +inf%" in outcome.err, outcome.err
    budget = read_manifest(tmp_path / "run" / "artifact").budget
    assert budget is not None and [trial.perplexity for trial in budget.tried] == [None, 12.0]
    assert budget.chosen.bits == 4
    assert "8 bits, " in mkaq("inspect", tmp_path / "run" / "artifact").out
