"""Why a stage is made again: two descriptions compared, and what `mkaq run --explain` says."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mkaq.digests import library_versions
from mkaq.run import provenance
from mkaq.run.provenance import Provenance, differences, reason
from tests.runs import STAGES, Mkaq, Outcome, told, tree
from tests.tiny import PROTECT, edit_config, write_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
RAN = {"device": "cpu", "compute_dtype": "float32", "fast_bfloat16": False, "threads": 2, "processes": 1}
SETTINGS = {"layers": 2, "ratio": None, "protect": {"first": 1}, "dtype": "torch.bfloat16", "ran_on": RAN}
OLD = Provenance("merge", SETTINGS, {"source": "a", "analyze": "b"}, "0.1", {"torch": "2.12.1", "numba": "1"})
NONE = "nothing like it is stored"
UNKNOWN = "what is stored was made by a version that did not record why"

# --- two descriptions --------------------------------------------------------------------------


def with_settings(stage: str = "merge", **changes: Any) -> Provenance:
    return replace(OLD, stage=stage, settings=SETTINGS | changes)


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (with_settings(layers=3), "merge.layers is 3 and was 2"),
        (
            with_settings(layers=None, ratio=0.5),
            "merge.layers is null and was 2; merge.ratio is 0.5 and was null",
        ),
        (with_settings(layers=2.0), "merge.layers is 2.0 and was 2"),
        (with_settings(protect={"first": 0}), "merge.protect.first is 0 and was 1"),
        (with_settings(protect=None), "merge.protect is null and was another"),
        (with_settings(path="a\nb"), r"merge.path is a\nb and was not there"),
        (with_settings(path="a" * 99), "merge.path is another and was not there"),
        (with_settings(dtype="torch.float32"), "model.dtype is torch.float32 and was torch.bfloat16"),
        (with_settings("calibrate", layers=3), "calibration.layers is 3 and was 2"),
        (with_settings("evaluate", layers=3), "evaluate.perplexity.layers is 3 and was 2"),
        (with_settings("artifact", recipe={"name": "x"}), "recipe is another and was not there"),
        (with_settings("analyze", candidates=[[1, 2]]), "the groups that it measures are others"),
        (with_settings(ran_on=RAN | {"threads": 1}), "it ran with 2 threads and now with 1"),
        (with_settings(ran_on=RAN | {"processes": 4}), "it ran with 1 processes and now with 4"),
        (with_settings(ran_on=RAN | {"device": "NVIDIA H100"}), "it ran on cpu and now on NVIDIA H100"),
        (with_settings(ran_on=RAN | {"compute_dtype": "bfloat16"}), "it ran in float32 and now in bfloat16"),
        (with_settings(ran_on=RAN | {"fast_bfloat16": True}), "it ran without fast bfloat16 and now with"),
        (replace(OLD, inputs={"source": "a", "analyze": "c"}), "its input analyze is another"),
        (replace(OLD, inputs={"source": "a"}), "it no longer reads analyze"),
        (replace(OLD, inputs=OLD.inputs | {"text": "t"}), "it now reads text"),
        (replace(OLD, mkaq="0.2"), "mkaq is 0.2 and was 0.1"),
        (replace(OLD, libraries={"torch": "2.13.0", "numba": "1"}), "torch is 2.13.0 and was 2.12.1"),
        (replace(OLD, libraries={"torch": "2.12.1"}), "numba is not there and was 1"),
    ],
)
def test_each_difference_has_its_words(new: Provenance, said: str) -> None:
    assert differences(new, replace(OLD, stage=new.stage)) == said.split("; ")
    assert (new.fingerprint == replace(OLD, stage=new.stage).fingerprint) is False


def test_nothing_differs_exactly_if_the_fingerprints_are_the_same() -> None:
    again = Provenance(**json.loads(json.dumps(vars(OLD))))
    assert differences(again, OLD) == [] and again.fingerprint == OLD.fingerprint


def test_fingerprint_is_that_of_earlier_versions() -> None:
    """Else their stores would be made again."""
    parts = {"stage": "merge", "section": SETTINGS, "inputs": OLD.inputs, "mkaq": "0.1"}
    assert OLD.fingerprint == provenance.digest_of({**parts, "libraries": OLD.libraries})


def test_the_nearest_is_compared_and_of_two_the_later() -> None:
    far, near = with_settings(layers=5, ratio=0.1), with_settings(layers=4)
    assert reason(OLD, [far, None, near]) == reason(OLD, [near, far]) == "merge.layers is 2 and was 4"
    assert reason(OLD, [near, with_settings(layers=9)]) == "merge.layers is 2 and was 9"


def test_what_cannot_be_compared() -> None:
    assert reason(OLD, []) == NONE
    measured, other = replace(OLD, stage="evaluate"), {"merge": "d"}
    assert reason(measured, [replace(measured, inputs=other)]) == NONE  # it is of another model
    assert reason(OLD, [None, None]) == UNKNOWN
    assert reason(OLD, [OLD]) == "the stored one is not as it was written"


def test_many_differences_are_counted() -> None:
    new = with_settings(**dict.fromkeys("abcde", 1))
    assert reason(new, [OLD]).endswith("merge.c is 1 and was not there; 2 more")


# --- the command line --------------------------------------------------------------------------


def reasons(outcome: Outcome) -> dict[str, str]:
    """Why each stage was made, by the lines of a run."""
    assert outcome.code == 0, outcome.err
    lines = [line.partition(": made, since ") for line in outcome.err.splitlines()]
    return {stage: why for stage, made, why in lines if made}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("name=other", {"artifact": "name is other and was test; recipe.name is other and was test"}),
        (
            "quantize.bits=8",
            {
                "quantize": "quantize.bits is 8 and was 4",
                "evaluate/quantize": "its input quantize is another",
                "artifact": None,
            },
        ),
        (
            "merge.coefficient=0.25",
            {
                "merge": "merge.coefficient is 0.25 and was similarity",
                "evaluate/merge": "its input merge is another",
                "quantize": "its input merge is another",
                "evaluate/quantize": "its input quantize is another",
                "artifact": None,
            },
        ),
    ],
)
def test_changed_recipe(
    change: str, expected: dict[str, str | None], plain: Path, copy: Path, mkaq: Mkaq
) -> None:
    outcome = mkaq("run", plain, "--output", copy, "--set", change, "--explain")
    found = reasons(outcome)
    assert found | {stage: None for stage, why in expected.items() if why is None} == expected
    assert {stage for stage, kept in told(outcome).items() if not kept} == found.keys()
    assert "calibrate: unchanged, kept" in outcome.err
    assert change.partition("=")[0].rpartition(".")[2] in found["artifact"]


def test_without_the_option_nothing_is_said(plain: Path, copy: Path, mkaq: Mkaq) -> None:
    outcome = mkaq("run", plain, "--output", copy, "--set", "quantize.bits=8")
    assert reasons(outcome) == {}


def test_changed_source(copy: Path, model: Path, text: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    source = shutil.copytree(model, tmp_path / "model")
    recipe = write_recipe(tmp_path / "recipe.yaml", source, text)
    edit_config(source, rms_norm_eps=1e-5)
    found = reasons(mkaq("run", recipe, "--output", copy, "--explain", "--until", "calibrate"))
    assert found == dict.fromkeys(("evaluate/source", "calibrate"), "its input source is another")


def test_other_version_and_threads(
    plain: Path, copy: Path, mkaq: Mkaq, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = library_versions()
    monkeypatch.setattr(provenance, "library_versions", lambda: versions | {"torch": "99"})
    torch.set_num_threads(2)
    try:
        found = reasons(mkaq("run", plain, "--output", copy, "--explain", "--until", "analyze"))
    finally:
        torch.set_num_threads(1)
    version = f"torch is 99 and was {versions['torch']}"
    assert found == {
        "calibrate": version,
        **dict.fromkeys(("evaluate/source", "analyze"), f"it ran with 1 threads and now with 2; {version}"),
    }


def test_new_folder_and_fresh(plain: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    line = ("run", plain, "--output", tmp_path / "run", "--until", "calibrate", "--explain")
    assert reasons(mkaq(*line)) == {"evaluate/source": NONE, "calibrate": NONE}
    assert reasons(mkaq(*line)) == {}
    assert set(reasons(mkaq(*line, "--fresh")).values()) == {"--fresh makes every stage again"}


def test_damaged_stage(plain: Path, copy: Path, mkaq: Mkaq) -> None:
    (copy / "merge" / "model.safetensors").write_bytes(b"")
    outcome = mkaq("run", plain, "--output", copy, "--explain")
    assert reasons(outcome) == {"merge": "the stored one is not as it was written"}


def test_handoff_of_a_version_that_did_not_record_it(plain: Path, copy: Path, mkaq: Mkaq) -> None:
    """It is reused as ever; only the reason is not known."""
    for place in [*copy.glob("store/*/handoff.json"), copy / ".artifact.handoff.json"]:
        data = json.loads(place.read_text())
        for key in ("settings", "mkaq", "libraries"):
            del data[key]
        place.write_text(json.dumps(data))
    before = tree(copy / "store")
    assert told(mkaq("run", plain, "--output", copy, "--explain")) == dict.fromkeys(STAGES, True)
    assert tree(copy / "store") == before
    found = reasons(mkaq("run", plain, "--output", copy, "--explain", "--set", "quantize.bits=8"))
    assert found == dict.fromkeys(("quantize", "evaluate/quantize", "artifact"), UNKNOWN)


@pytest.mark.parametrize("content", ["{", "[]", '{"fingerprint": "x", "files": [{"path": "a"}]}', ""])
def test_unreadable_handoff_of_another_stage_is_passed_over(
    content: str, plain: Path, copy: Path, mkaq: Mkaq
) -> None:
    (copy / "quantize" / "handoff.json").write_text(content)
    outcome = mkaq("run", plain, "--output", copy, "--explain", "--set", "quantize.bits=8")
    assert reasons(outcome)["quantize"] == NONE


def test_trials_of_a_budget(tiny: Path, text: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    budget = {"perplexity_increase": "99999%", "bits": [8, 4]}
    sections: dict[str, Any] = {"merge": PROTECT, "quantize": {"method": "gptq", "group_size": 32}}
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny, text, **sections, budget=budget)
    outcome = mkaq("run", recipe, "--output", tmp_path / "run", "--explain")
    said = [line for line in outcome.err.splitlines() if ": made, since " in line]
    assert len(said) == outcome.err.count(": done in "), outcome.err
    assert any(line.startswith("merge: made, since merge.layers is ") for line in said)
    assert any(line.startswith("quantize: made, since quantize.bits is 4 and was 8") for line in said)


def test_artifact_does_not_depend_on_what_the_handoffs_hold(
    plain: Path, copy: Path, done: Path, mkaq: Mkaq
) -> None:
    for place in copy.glob("store/*/handoff.json"):
        data = json.loads(place.read_text())
        place.write_text(json.dumps(data | {"libraries": {}, "settings": None}))
    shutil.rmtree(copy / "artifact")
    assert told(mkaq("run", plain, "--output", copy)) == {stage: stage != "artifact" for stage in STAGES}
    assert tree(copy / "artifact") == tree(done / "artifact")
