"""Recovery: a layer gets better or stays as it was, and the stage runs, resumes and is verified."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import load_file

from mkaq.checkpoint.validate import open_checkpoint
from mkaq.fit.hold_out import hold_out
from mkaq.manifest import MANIFEST, manifest_schema, read_manifest
from mkaq.merge.average import merge_layers
from mkaq.recover.layerwise import RecoveredLayer, layer_error, tune
from mkaq.recover.steps import Tuning, schedule, shuffled
from mkaq.stages.recover import RecoverRecord
from mkaq.walk.walk import LayerWalk
from tests.runs import Mkaq, Outcome, forge, tree
from tests.tiny import PROTECT, make_model, write_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
SINGLE = "model.safetensors"
TOKENS = torch.randint(2, 4096, (16, 32), generator=torch.Generator().manual_seed(1))
SAMPLES = hold_out(TOKENS)
STAGES = ["calibrate", "analyze", "merge", "recover", "quantize", "artifact"]


# --- one layer ---------------------------------------------------------------------------------


class Bench:
    """The average of layers 1 and 2, what it sees, and what it should give."""

    def __init__(self, model: Path) -> None:
        self.walk = LayerWalk(open_checkpoint(model), CPU)
        weights = merge_layers(self.walk.layer_tensors, {1: 0.5, 2: 0.5})
        self.weights = {name: tensor.to(torch.bfloat16).float() for name, tensor in weights.items()}
        self.targets = self.walk.embed(TOKENS)
        self.walk.pass_layer(0, self.targets)
        self.inputs = self.targets.clone()
        for index in (1, 2):
            self.walk.pass_layer(index, self.targets)

    def layer(self) -> torch.nn.Module:
        return self.walk.assemble(1, {name: tensor.clone() for name, tensor in self.weights.items()})

    def error(self, layer: torch.nn.Module) -> float:
        return layer_error(self.walk, layer, 1, self.inputs, self.targets, SAMPLES)

    def tune(self, layer: torch.nn.Module, seed: int = 0, **settings: Any) -> RecoveredLayer:
        tuning = Tuning(**{"learning_rate": "auto", "batch_size": 4, "seed": seed, **settings})
        return tune(self.walk, layer, 1, self.inputs, self.targets, SAMPLES, tuning, torch.bfloat16)


@pytest.fixture(scope="module")
def bench(tiny: Path) -> Bench:
    return Bench(tiny)


def same(layer: torch.nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(parameter, weights[name]) for name, parameter in layer.named_parameters())


def test_tuning_lowers_the_held_out_error(bench: Bench) -> None:
    layer = bench.layer()
    before = bench.error(layer)
    record = bench.tune(layer, steps=30)
    assert record.error_before == before and 0 < record.steps <= 30
    assert record.error == bench.error(layer) < 0.9 * before
    for parameter in layer.parameters():
        assert not parameter.requires_grad
        assert torch.equal(parameter, parameter.to(torch.bfloat16).float())


def test_tuning_that_does_harm_is_undone(bench: Bench) -> None:
    layer = bench.layer()
    record = bench.tune(layer, steps=3, learning_rate=0.9)
    assert (record.steps, record.error) == (0, record.error_before)
    assert same(layer, bench.weights)


def test_the_held_out_samples_are_not_learned_from(bench: Bench) -> None:
    """Of 16 samples the last two: what they should give changes the choice, not the gradients."""
    layers = [bench.layer(), bench.layer()]
    bench.tune(layers[0], steps=1, batch_size=16)
    held = bench.targets[14:].clone()
    bench.targets[14:] = bench.targets[14:].flip(0) * 1.01
    record = bench.tune(layers[1], steps=1, batch_size=16)
    bench.targets[14:] = held
    assert record.steps in (0, 1)
    assert same(layers[1], bench.weights if record.steps == 0 else dict(layers[0].named_parameters()))


def test_layer_without_error_is_left_alone(bench: Bench) -> None:
    layer, targets = bench.layer(), bench.targets
    bench.targets = bench.inputs.clone()
    bench.walk.run_all(layer, 1, bench.targets)
    record = bench.tune(layer, steps=3, learning_rate=0.9)
    bench.targets = targets
    assert record == RecoveredLayer(1, 0.0, 0.0, 0)
    assert same(layer, bench.weights)


def test_seed_is_all_that_changes_the_outcome(bench: Bench) -> None:
    layers = [bench.layer() for _ in range(3)]
    records = [bench.tune(layer, seed, steps=10) for layer, seed in zip(layers, (0, 0, 1), strict=True)]
    assert records[0] == records[1] and records[0] != records[2]
    assert same(layers[0], dict(layers[1].named_parameters()))
    assert not same(layers[0], dict(layers[2].named_parameters()))


def test_schedule_rises_and_falls() -> None:
    rates = [schedule(step, 100) for step in range(101)]
    assert rates[:5] == [0.2, 0.4, 0.6, 0.8, 1.0] and rates[5] == 1.0
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[100] == 0
    assert schedule(24, 43) == pytest.approx(0.5 * (1 + math.cos(math.pi * 22 / 41)))
    assert (schedule(0, 1), schedule(0, 2), schedule(1, 2)) == (1.0, 1.0, 1.0)
    assert schedule(2, 2) == pytest.approx(0)
    assert [schedule(step, 21, 20) for step in (0, 9, 10)] == [0.1, 1.0, 1.0]  # half of the steps at most
    assert schedule(0, 600, 20) == schedule(0, 600) == 1 / 30


def test_samples_come_in_whole_rounds() -> None:
    endless = shuffled(6, 2, 5)
    rounds = [torch.cat(list(itertools.islice(endless, 3))).tolist() for _ in range(2)]
    assert [sorted(order) for order in rounds] == [list(range(6))] * 2 and rounds[0] != rounds[1]
    for seed, repeats in ((5, True), (6, False)):
        assert (torch.cat(list(itertools.islice(shuffled(6, 2, seed), 3))).tolist() == rounds[0]) == repeats
    uneven = [len(batch) for batch in itertools.islice(shuffled(7, 3, 0), 5)]
    assert uneven == [3] * 5  # the seventh waits for another round
    assert sorted(next(shuffled(3, 32, 0)).tolist()) == [0, 1, 2]
    assert len(next(shuffled(3, 2, 2**63 + 1))) == 2


# --- the stage ---------------------------------------------------------------------------------


def tuned_recipe(path: Path, model: Path, text: Path, **sections: Any) -> Path:
    plain: dict[str, Any] = {
        "calibration": {"dataset": "text", "path": str(text), "num_samples": 16, "max_seq_length": 32},
        "merge": {"layers": 2, **PROTECT, "coefficient": 0.7},
        "recover": {"method": "layerwise", "steps": 20, "batch_size": 4},
        "quantize": None,
        "evaluate": None,
    }
    return write_recipe(path, model, text, **plain | sections)


def told(outcome: Outcome) -> dict[str, bool]:
    """Each stage of a run, and whether it was kept."""
    assert outcome.code == 0, outcome.err
    lines = [line.partition(": ") for line in outcome.err.splitlines()]
    return {stage: text == "unchanged, kept" for stage, _, text in lines if stage in STAGES}


def recover_step(artifact: Path) -> RecoverRecord:
    return next(step for step in read_manifest(artifact).steps if isinstance(step, RecoverRecord))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_recovered_run(family: str, text: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    model, folder = make_model(tmp_path / "model", family), tmp_path / "run"
    artifact = folder / "artifact"
    recipe = tuned_recipe(tmp_path / "r.yaml", model, text)
    outcome = mkaq("run", recipe, "--output", folder)
    stages = [stage for stage in STAGES if stage != "quantize"]
    assert told(outcome) == dict.fromkeys(stages, False)
    assert [line.split()[0] for line in outcome.out.splitlines()[1:4]] == ["source", "merge", "recover"]

    step = recover_step(artifact)
    jsonschema.validate(json.loads((artifact / MANIFEST).read_text()), manifest_schema())
    assert [layer.new for layer in step.layers] == [0, 1]
    assert (step.layers_before, step.layers_after) == (2, 2)
    assert step.layers[0].steps == 0 and step.layers[0].error == step.layers[0].error_before < 1e-9
    assert step.layers[1].steps > 0 and step.layers[1].error < step.layers[1].error_before
    merged, tuned = load_file(folder / "merge" / SINGLE), load_file(folder / "recover" / SINGLE)
    assert merged.keys() == tuned.keys()
    changed = {name for name in merged if not torch.equal(merged[name], tuned[name])}
    assert changed and all(name.startswith("model.layers.1.") for name in changed)
    assert step.divergence < step.divergence_before
    assert (artifact / SINGLE).read_bytes() == (folder / "recover" / SINGLE).read_bytes()

    told_end = f"last layer: divergence {step.divergence_before:.4f} to {step.divergence:.4f}"
    assert told_end in mkaq("inspect", artifact).out and told_end in (folder / "report.html").read_text()

    before = tree(artifact)
    again = mkaq("run", recipe, "--output", folder)
    assert told(again) == dict.fromkeys(stages, True)
    assert tree(artifact) == before
    verified = mkaq("verify", artifact, "--source", model)
    assert verified.code == 0, verified.err
    assert "the errors of hidden states that the manifest says (recover" in verified.out

    forge(artifact, lambda m: m["steps"][1]["layers"][1].update(error=step.layers[1].error * 0.9))
    refused = mkaq("verify", artifact, "--source", model)
    assert refused.code == 5 and "layer 1 leaves an error of" in refused.err


def test_changed_settings_redo_the_recovery_and_what_follows(
    tiny: Path, text: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    folder, fresh = tmp_path / "run", tmp_path / "fresh"
    quantize = {"method": "gptq", "bits": 4, "group_size": 32}
    recipe = tuned_recipe(tmp_path / "r.yaml", tiny, text, quantize=quantize)
    outcome = mkaq("run", recipe, "--output", folder, "--until", "recover")
    assert told(outcome) == dict.fromkeys(STAGES[:4], False)
    assert outcome.out.splitlines()[-1] == f"stopped after recover: {folder}"
    outcome = mkaq("run", recipe, "--output", folder)
    assert told(outcome) == {stage: n < 4 for n, stage in enumerate(STAGES)}
    change = ("--set", "recover.steps=10")
    outcome = mkaq("run", recipe, "--output", folder, *change)
    assert told(outcome) == {stage: n < 3 for n, stage in enumerate(STAGES)}
    assert told(mkaq("run", recipe, "--output", fresh, *change)) == dict.fromkeys(STAGES, False)
    assert tree(folder / "artifact") == tree(fresh / "artifact")
    assert [step.step for step in read_manifest(fresh / "artifact").steps] == ["merge", "recover", "quantize"]
    verified = mkaq("verify", fresh / "artifact", "--source", tiny)
    assert verified.code == 0, verified.err
    assert "errors that recover recorded not measured again: the weights were changed" in verified.out


def test_fused_layers_are_tuned_or_kept(tiny: Path, text: Path, mkaq: Mkaq, tmp_path: Path) -> None:
    """Both records stand side by side: that of the fusion, and what tuning made of it."""
    merge = {"layers": 1, "fuse": "channels", "order": "measured", "protect": {"first": 1, "last": 0}}
    folder = tmp_path / "run"
    assert (
        mkaq("run", tuned_recipe(tmp_path / "r.yaml", tiny, text, merge=merge), "--output", folder).code == 0
    )
    merge_step = read_manifest(folder / "artifact").steps[0]
    merged, tuned = load_file(folder / "merge" / SINGLE), load_file(folder / "recover" / SINGLE)
    for layer, fused in zip(recover_step(folder / "artifact").layers, merge_step.layers, strict=True):
        names = [name for name in merged if f".layers.{layer.new}." in name]
        kept = all(torch.equal(merged[name], tuned[name]) for name in names)
        assert kept == (layer.steps == 0)
        assert layer.error == layer.error_before if kept else layer.error < layer.error_before
        if layer.new == 1:  # the layers before it are as the fusion left them
            assert layer.error_before == pytest.approx(fused.fused.residual, rel=0.01, abs=1e-9)
    verified = mkaq("verify", folder / "artifact", "--source", tiny)
    assert verified.code == 0, verified.err
    assert "the errors of hidden states that the manifest says (recover" in verified.out
