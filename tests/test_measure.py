"""Measured groups: the divergence of the output, by closed forms and on a model with idle layers."""

import math
from pathlib import Path

import pytest
import torch

from mkaq.checkpoint.finished import Finished
from mkaq.merge.cost import by_average, by_channels, divergences, measure_groups, split_samples
from mkaq.merge.segment import cheapest_groups
from mkaq.progress import Progress
from mkaq.ranks import ALONE
from mkaq.walk.walk import LayerWalk
from tests.test_baselines import idle, random_tokens


def test_divergence_of_two_coins() -> None:
    p, q = (0.25, 0.75), (0.5, 0.5)
    states = [torch.tensor(x).log().expand(6, 2) for x in (q, p)]
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    found = divergences(lambda hidden_states: hidden_states, states, states[1]).tolist()
    assert found == [pytest.approx(6 * expected, rel=1e-6), pytest.approx(0, abs=1e-6)]


@pytest.mark.parametrize("fuse", ["channels", "average"])
def test_groups_with_an_idle_layer_cost_nothing(fuse: str, tmp_path: Path) -> None:
    """Layer 2 does nothing: layer 1 need not change, and in its own place layer 3 fits whole."""
    walk = idle(tmp_path / "model", (2,))
    build = by_channels(walk, torch.float32) if fuse == "channels" else by_average(walk, None)
    candidates = [(start, 2) for start in range(1, 5)]
    costs = measure_groups(
        walk, random_tokens(32), 0, candidates, build, Progress(quiet=True), Finished(None, ALONE)
    )
    assert sorted(costs) == candidates
    free = [(1, 2), (2, 2)] if fuse == "channels" else [(1, 2)]
    for group, cost in costs.items():
        assert cost == pytest.approx(0, abs=1e-6) if group in free else cost > 1e-4, group
    assert cheapest_groups(costs, 6, 1)[1:3] in ([[1, 2], [3]], [[1], [2, 3]])


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("count", [48, 72, 100, 512])
def test_what_measures_builds_nothing(count: int, processes: int) -> None:
    tokens = torch.arange(count)[:, None]
    sample, probes = (set(part[:, 0].tolist()) for part in split_samples(tokens, processes, 5))
    assert sample.isdisjoint(probes) and len(probes) == min(24, count // 4)
    assert len(sample) >= 16 and len(sample) % 8 == 0 and 0 in sample
    assert [set(p[:, 0].tolist()) for p in split_samples(tokens, 1, 5)] == [sample, probes]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_few_samples_build_and_measure_all(processes: int) -> None:
    tokens = torch.arange(8)[:, None]
    sample, probes = split_samples(tokens, processes, 5)
    assert torch.equal(sample, tokens) and torch.equal(probes, tokens[-2:])
    assert [len(part) for part in split_samples(tokens[:1], 1, 1)] == [1, 1]


@pytest.mark.parametrize(("candidates", "probes"), [(1, 24), (25, 24), (58, 11), (160, 4), (2000, 1)])
def test_more_candidates_are_measured_on_fewer_samples(candidates: int, probes: int) -> None:
    assert len(split_samples(torch.zeros(512, 1), 1, candidates)[1]) == probes


def test_walks_over_one_checkpoint_do_not_touch_each_other(tmp_path: Path) -> None:
    """Eager attention in one of them once left the other without its causal mask."""
    first = idle(tmp_path / "model", ())
    tokens = random_tokens()
    before = [states.clone() for _, states in first.hidden_states(tokens)]
    LayerWalk(first.checkpoint, first.device).use_eager_attention()
    for expected, (_, states) in zip(before, first.hidden_states(tokens), strict=True):
        assert torch.equal(states, expected)
