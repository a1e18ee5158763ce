"""Threads: nothing in mkaq changes how many torch uses, and solving real shapes ends."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from mkaq.fit.gram import solve_positive
from tests.runs import ROOT, Mkaq
from tests.tiny import CHANNELS, write_recipe

SOLVE = """
import torch
from mkaq.fit.moments import Moments
from mkaq.fit.select import keep_columns
torch.manual_seed(0)
for threads in (1, 2):
    torch.set_num_threads(threads)
    torch.randn(200_000).sum()
moments = Moments(1728, 576, torch.device("cpu"))
moments.add(torch.randn(4000, 1728), torch.randn(4000, 576), torch.ones(4000))
print(keep_columns(moments, 3, 1e-2, 192).tolist())
"""


def test_choosing_heads_of_a_real_model_ends() -> None:
    """Blocks of 192 columns, SmolLM2's, after the number of threads was changed: MKL's batched LU hangs."""
    done = subprocess.run(
        [sys.executable, "-c", SOLVE], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    kept = json.loads(done.stdout)
    assert len(set(kept)) == 3 and max(kept) < 9 and "MKL" not in done.stderr


def test_nothing_changes_the_number_of_threads(
    model: Path, text: Path, mkaq: Mkaq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(threads: int) -> NoReturn:
        raise AssertionError(f"the number of threads is set to {threads}")

    monkeypatch.setattr(torch, "set_num_threads", refuse)
    before = torch.get_num_threads()
    recover = {"method": "layerwise", "steps": 1}
    recipe = write_recipe(tmp_path / "r.yaml", model, text, merge=CHANNELS, recover=recover)
    outcome = mkaq("run", recipe, "--output", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert mkaq("verify", tmp_path / "run" / "artifact", "--source", model).code == 0
    assert torch.get_num_threads() == before
    files = (ROOT / "mkaq").rglob("*.py")
    assert not [
        path for path in files if re.search(r"set_num_threads|linalg\.(solve|inv)\(", path.read_text())
    ]


@pytest.mark.parametrize("shape", [(3, 5), (1, 40), (200, 2)])
def test_positive_definite_systems_are_solved(shape: tuple[int, int]) -> None:
    count, size = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, size, 2 * size, dtype=torch.float64, generator=generator)
    matrices, expected = x @ x.mT, torch.randn(count, size, 3, dtype=torch.float64, generator=generator)
    assert torch.allclose(solve_positive(matrices, matrices @ expected), expected)
    assert torch.allclose(solve_positive(matrices[0], matrices[0] @ expected[0]), expected[0])


def test_matrix_that_is_just_not_positive_definite_is_damped() -> None:
    flat = torch.ones(2, 3, 3, dtype=torch.float64)
    flat[:, 0, 0] -= 1e-14
    found = solve_positive(flat, torch.ones(2, 3, 1, dtype=torch.float64))
    assert torch.allclose(flat @ found, torch.ones(2, 3, 1, dtype=torch.float64), atol=1e-6)
    with pytest.raises(ArithmeticError):
        solve_positive(-torch.eye(3, dtype=torch.float64), torch.ones(3, 1, dtype=torch.float64))
