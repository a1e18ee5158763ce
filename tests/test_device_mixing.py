"""On a pretended GPU whatever is left on the wrong device is an error, as it is on a real one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_compare import compare, verified
from benchmarks.gpu_parts import small_recipes
from mkaq import pipeline
from mkaq.fit.hold_out import token_weights
from mkaq.fit.moments import Moments
from mkaq.fit.ridge import fit
from mkaq.fit.select import column_sizes, keep_columns
from mkaq.formats.packing import pack_linear
from mkaq.progress import Progress
from mkaq.quantize.gptq import find_scales, gptq
from mkaq.quantize.hessian import HessianSum
from mkaq.recipe import Recipe
from tests.pretend import pretended_gpu

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
RECIPES = small_recipes({"method": "layerwise", "steps": 2, "batch_size": 4}, 32)


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    with pretended_gpu() as device:
        yield device


def rows(count: int, features: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed))


def test_pretended_gpu_refuses_what_a_real_one_does(gpu: torch.device) -> None:
    here, there = rows(4, 4), rows(4, 4).to(gpu)
    assert there.device == gpu and here.device == CPU and torch.zeros(2, device=gpu).device == gpu
    assert (there @ there).device == gpu and there[torch.tensor([0, 2])].device == gpu
    with pytest.raises(RuntimeError, match="same device"):
        here @ there
    with pytest.raises(RuntimeError, match="same device"):
        torch.cat([here, there])
    with pytest.raises(RuntimeError, match="same device"):
        here[torch.zeros(2, dtype=torch.int64, device=gpu)]
    with pytest.raises(RuntimeError, match="same device"):
        there[torch.tensor([0, 1])] = here[:2]
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    here[1:3] = there[1:3]  # a copy
    back = there.cpu()
    back.zero_()
    assert there.abs().sum() > 0 and torch.equal(there.cpu(), here)


@pytest.mark.parametrize("options", [{}, {"desc_act": True}, {"desc_act": True, "static_groups": True}])
def test_gptq_stays_on_its_device(gpu: torch.device, options: dict[str, Any]) -> None:
    weight, inputs = rows(32, 256), rows(600, 256, 1)
    found = []
    for device in (CPU, gpu):
        total = HessianSum(256, device)
        for batch in inputs.to(device).split(200):
            total.add(batch)
        result = gptq(weight.to(device), total.whole(), bits=4, group_size=64, **options)
        assert result.codes.device == result.weight.device == result.errors.device == device
        packed = pack_linear(result.codes, result.scales, result.zeros, result.g_idx, 4)
        assert all(tensor.device == CPU for tensor in packed.values())
        found.append(packed["qweight"])
    assert torch.equal(*found)
    scales, zeros = find_scales(weight.to(gpu), torch.ones(256, device=gpu), 3, False)
    assert scales.device == zeros.device == gpu


def test_least_squares_stays_on_its_device(gpu: torch.device) -> None:
    features, targets = rows(400, 32), rows(400, 8, 1)
    found = []
    for device in (CPU, gpu):
        z, r = features.to(device), targets.to(device)
        learn, held = Moments(32, 8, device), Moments(32, 8, device)
        learn.add(z[:300], r[:300], token_weights(r[:300]))
        held.add(z[300:], r[300:], token_weights(r[300:]))
        kept = keep_columns(learn, 4, 1e-2, group=4)
        solved = fit(learn, held, rows(8, 32, 2).to(device) * 0.1, 0.9)
        sizes = column_sizes(z, token_weights(r), rows(8, 32, 2))
        assert kept.device == solved.weight.device == sizes.device == device
        found.append((kept.tolist(), solved.ridge, round(solved.error, 6)))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["average_gptq4", "channels_recover_gptq4_source", "merge_only"])
def test_a_whole_run(gpu: torch.device, tmp_path: Path, tiny: Path, name: str) -> None:
    text = {"dataset": "builtin", "num_samples": 8, "max_seq_length": 32}
    base = {"version": 1, "name": "test", "model": {"path": str(tiny)}, "calibration": text}
    recipe = Recipe.model_validate(base | {"evaluate": {"perplexity": text}} | RECIPES[name])
    for device in (gpu, CPU):
        pipeline.run(recipe, tmp_path / device.type, device, Progress(quiet=True))
    found = compare(tmp_path / "cuda", tmp_path / "cpu")
    assert found["groups_same"] and 0.9 < found["perplexity_ratio"]["merge"] < 1.1
    assert verified(tmp_path / "cuda" / "artifact", tiny, gpu)["exit"] == 0
