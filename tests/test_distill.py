"""Distillation from end to end: run, stopped and gone on, kept or not, recorded and verified."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mkaq.checkpoint.validate import open_checkpoint
from mkaq.distill import gate
from mkaq.distill.course import WARM_UP
from mkaq.distill.gate import PATIENCE, Check, length_of_steps
from mkaq.distill.student import Student
from mkaq.manifest import MANIFEST
from mkaq.plan import plan_recipe
from mkaq.recipe import Recipe
from mkaq.recipe_file import load_recipe
from mkaq.recover.steps import schedule
from mkaq.run.job import Job
from tests.runs import Mkaq, forge, one_message, run_quietly, tree
from tests.tiny import CHANNELS, make_model, write_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
WEIGHTS = "model.safetensors"
TALKS = "talks.jsonl"
LAYERWISE = {"method": "layerwise", "steps": 3, "batch_size": 4}


def course(text: Path) -> dict[str, Any]:
    """Sixteen steps, each of which is measured."""
    read = {"dataset": "text", "path": str(text), "num_samples": 293, "max_seq_length": 32}
    return {"method": "distill", "text": read, "batch_size": 16, "learning_rate": 3e-4}


def write(folder: Path, source: Path, text: Path, **sections: Any) -> Path:
    """Writes a recipe without quantization."""
    calibration = {"dataset": "text", "path": str(text), "num_samples": 64, "max_seq_length": 32}
    plain = {"calibration": calibration, "quantize": None, "evaluate": None, "merge": CHANNELS}
    return write_recipe(folder / "recipe.yaml", source, text, **plain | sections)


@pytest.fixture
def distill(text: Path) -> dict[str, Any]:
    return course(text)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that is surer than others here, so that there is something to learn."""
    return make_model(tmp_path_factory.mktemp("sure") / "model", initializer_range=0.1)


@pytest.fixture
def recipe(source: Path, text: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe for it."""
    return partial(write, tmp_path, source, text)


def step_of(folder: Path) -> dict[str, Any]:
    steps = json.loads((folder / "artifact" / MANIFEST).read_text())["steps"]
    found: dict[str, Any] = next(step for step in steps if step["step"] == "distill")
    return found


def apart(folder: Path, stage: str, other: str) -> float:
    one, two = (load_file(folder / name / WEIGHTS) for name in (stage, other))
    return max(float((one[name].float() - two[name].float()).abs().max()) for name in one)


@pytest.fixture(scope="module")
def learned(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all its steps, which rounding could end sooner. Not to be changed: copy it first."""
    folder = tmp_path_factory.mktemp("learned")
    written = write(folder, source, text, recover=[LAYERWISE, course(text)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mkaq.distill.course.is_over", lambda checks: False)
        return run_quietly(written, folder / "run")


def test_a_run_is_recorded_and_verified(
    learned: Path, source: Path, text: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    step = step_of(learned)
    assert [check["step"] for check in step["checks"]] == list(range(17)) and step["steps"] == 16
    assert step["learned"] == 257 * 32 and step["best"] > 0
    ran_on = json.loads((learned / "artifact" / MANIFEST).read_text())["ran_on"]
    assert ran_on["distill"]["compute_dtype"] == "float32"
    first, best = step["checks"][0], step["checks"][step["best"]]
    assert best["own"] < first["own"] and best["other"] <= first["other"]
    assert apart(learned, "distill", "recover") > 0
    verified = mkaq("verify", learned / "artifact", "--source", source)
    assert verified.code == 0 and "the divergences that the manifest says (distill;" in verified.out
    inspected = mkaq("inspect", learned / "artifact")
    assert "distill: 8,224 predictions learned; divergence" in inspected.out
    report = (learned / "report.html").read_text()
    assert "Distillation" in report and f"{best['step']}, kept" in report
    assert '<img alt="curves" src="data:image/png;base64,' in report
    run = shutil.copytree(learned, tmp_path / "run", symlinks=True)
    other = write(tmp_path, source, text, recover=[LAYERWISE, {**course(text), "epochs": 2}])
    again = mkaq("run", other, "--output", run)
    assert again.code == 0 and "teacher: unchanged, kept" in again.err and "distill: done" in again.err
    assert "distill, all weights" in again.out


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda step: step.update(best=3), "choose number"),
        (lambda step: step.update(best=99), "best is number 99 of 17 measurements"),
        (lambda step: step["text"].update(top_k=8), "other text leaves an error"),
        (lambda step: step["checks"][1].update(step=7), "rising steps"),
        (lambda step: step["checks"][step["best"]].update(own=1e-9), "the text that was learned leaves"),
        (lambda step: step["checks"][0].update(own=-1.0), "choose number"),
    ],
)
def test_forged_curves_are_found(
    edit: Callable[[Any], None], words: str, learned: Path, source: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    artifact = shutil.copytree(learned / "artifact", tmp_path / "artifact")
    forge(artifact, lambda data: edit(data["steps"][-1]))
    one_message(mkaq("verify", artifact, "--source", source), 5, words)


def test_verify_names_the_text_that_is_not_here(
    learned: Path, source: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    artifact = shutil.copytree(learned / "artifact", tmp_path / "artifact")
    forge(artifact, lambda data: data["steps"][-1]["text"].update(path="moved.txt"))
    verified = mkaq("verify", artifact, "--source", source)
    assert verified.code == 0
    assert "not measured again: the text of the distillation is not here (moved.txt: no such" in verified.out


@pytest.mark.parametrize(
    ("fits", "adapter"), [(True, None), (False, {"r": 8, "alpha": 16})], ids=["weights", "adapter in turn"]
)
def test_a_stopped_distillation_goes_on_to_the_same_bytes(
    fits: bool,
    adapter: Any,
    recipe: Callable[..., Path],
    distill: dict[str, Any],
    mkaq: Mkaq,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Job, "fits", fits)
    monkeypatch.setattr("mkaq.distill.course.is_over", lambda checks: False)
    written = recipe(recover={**distill, "adapter": adapter})
    assert mkaq("run", written, "--output", tmp_path / "whole").code == 0
    way = "together" if fits else "in_turn"
    learn, steps = getattr(Student, way), list[int]()

    def noted(student: Any, lesson: Any, number: int, rate: float) -> float:
        steps.append(number)
        if steps == [1, 2, 3, 4, 5]:
            raise KeyboardInterrupt
        found: float = learn(student, lesson, number, rate)
        return found

    monkeypatch.setattr(Student, way, noted)
    monkeypatch.setattr("mkaq.session.LONG", -1.0)
    assert mkaq("run", written, "--output", tmp_path / "run").code == 75
    steps.clear()
    outcome = mkaq("run", written, "--output", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert steps == list(range(5, 17)) and not list(tmp_path.glob("run/store/.*"))
    assert tree(tmp_path / "run" / "artifact") == tree(tmp_path / "whole" / "artifact")


def test_what_only_harms_is_not_kept(
    recipe: Callable[..., Path], distill: dict[str, Any], mkaq: Mkaq, tmp_path: Path
) -> None:
    """A learning rate at which all is lost: the weights stay, the run says so, and --strict refuses."""
    written = recipe(recover={**distill, "learning_rate": 0.9, "epochs": 4})
    outcome = mkaq("run", written, "--output", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    step = step_of(tmp_path / "run")
    assert step["best"] == 0 and len(step["checks"]) == 1 + PATIENCE and step["steps"] == 64
    assert apart(tmp_path / "run", "distill", "merge") == 0
    assert "fallbacks: " in outcome.out and "no weights were better on both texts" in outcome.out
    ended = f"ended after step {step['checks'][-1]['step']}: nothing was better any more"
    assert ended in outcome.err and ended in mkaq("inspect", tmp_path / "run" / "artifact").out
    one_message(mkaq("run", written, "--output", tmp_path / "run", "--strict"), 5, "no weights were better")


@pytest.mark.parametrize("rate", [0.05, "auto"])
def test_the_rate_follows_the_measurements(
    recipe: Callable[..., Path],
    distill: dict[str, Any],
    mkaq: Mkaq,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rate: float | str,
) -> None:
    used, learn = [], Student.together

    def noted(student: Any, lesson: Any, number: int, rate: float) -> float:
        used.append(rate)
        found: float = learn(student, lesson, number, rate)
        return found

    monkeypatch.setattr(Student, "together", noted)
    monkeypatch.setattr(gate, "MUCH", 100.0)
    written = recipe(recover={**distill, "learning_rate": rate})
    assert mkaq("run", written, "--output", tmp_path / "run").code == 0
    checks = [Check(**check) for check in step_of(tmp_path / "run")["checks"]]
    peak = 0.2 / 64 if rate == "auto" else rate
    shares = [length_of_steps(checks[: number + 1], eased=rate == "auto") for number in range(len(used))]
    assert used == [peak * (share * schedule(step, 16, WARM_UP)) for step, share in enumerate(shares)]
    assert shares[0] < 0.1 if rate == "auto" else shares[:4] == [1, 1 / 2, 1 / 4, 1 / 8]


def test_an_infinite_loss_ends_it(
    recipe: Callable[..., Path],
    distill: dict[str, Any],
    mkaq: Mkaq,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learn = Student.together

    def broken(student: Any, lesson: Any, number: int, rate: float) -> float:
        found = learn(student, lesson, number, rate)
        return float("nan") if number == 3 else found

    monkeypatch.setattr(Student, "together", broken)
    written = recipe(recover=distill)
    outcome = mkaq("run", written, "--output", tmp_path / "run")
    assert outcome.code == 0 and "step 3: not finite" in outcome.err
    assert [check["step"] for check in step_of(tmp_path / "run")["checks"]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("recover", "words"),
    [
        ([{"method": "distill"}, {"method": "layerwise"}], "layerwise before distill"),
        ([{"method": "distill"}, {"method": "distill"}], "each method once"),
        ([], "at least 1 item"),
        ({"method": "distil"}, "must be one of 'layerwise', 'distill'"),
        ([{"method": "distill", "epoch": 2}], "did you mean 'epochs'?"),
        ({"method": "distill", "text": {"dataset": "text"}}, "dataset text needs a path"),
        ({"method": "distill", "text": {"max_seq_length": 4096}}, "longer than the model's"),
        (
            {"method": "distill", "text": {"dataset": "text", "path": "nowhere.txt"}},
            "give recover.text.path",
        ),
        ({"method": "distill", "gate": "nowhere.txt"}, "give recover.gate an existing path"),
        ({"method": "distill", "text": {"dataset": "jsonl", "path": TALKS}}, "has no chat template"),
    ],
)
def test_recipes_that_are_refused(
    recover: Any,
    words: str,
    recipe: Callable[..., Path],
    mkaq: Mkaq,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    Path(TALKS).write_text(json.dumps({"messages": talk}))
    one_message(mkaq("plan", recipe(recover=recover)), 2, words)


def test_a_list_is_kept_as_it_is(recipe: Callable[..., Path]) -> None:
    both = [{"method": "layerwise"}, {"method": "distill"}]
    data = {"version": 1, "name": "x", "model": {"path": "m"}, "merge": {"layers": 1}, "recover": both}
    resolved = Recipe.model_validate(data)
    assert resolved.layerwise and resolved.distill and Recipe.model_validate(resolved.dump()) == resolved
    alone = Recipe.model_validate({**data, "recover": {"method": "distill"}})
    assert alone.layerwise is None and alone.distill is not None


def test_plan_knows_its_stages(recipe: Callable[..., Path], distill: dict[str, Any], mkaq: Mkaq) -> None:
    planned = json.loads(mkaq("plan", recipe(recover=distill), "--json").out)
    assert {"teacher", "distill"} <= planned["memory"].keys() - {"recover"}
    assert torch.tensor(planned["disk_bytes"]) > 293 * 32 * 386


def test_plan_counts_a_second_pass_where_layers_go_one_by_one(
    recipe: Callable[..., Path], distill: dict[str, Any], source: Path
) -> None:
    asked, model = load_recipe(recipe(recover=distill)), open_checkpoint(source)
    whole, in_turn = (plan_recipe(asked, model, torch.device("cpu"), limit) for limit in (None, 1))
    assert (whole.place, in_turn.place) == ("device", "files")
    added = in_turn.work["distill"].exact - whole.work["distill"].exact
    assert added == whole.sizes[-1].layers * 16 * 16 * 32
