"""GPTQ's inner loops for a GPU give the codes of the plain ones: on a GPU, or in Triton's interpreter."""

import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mkaq.quantize import solved
from mkaq.quantize.gptq import PLAIN, GptqResult, gptq
from mkaq.quantize.gptq_cpu import NUMBA
from tests.pretend import pretended_gpu
from tests.runs import ROOT
from tests.test_gptq import awkward_weight, problem

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = 21
ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if ON_GPU and not INTERPRETED else "cpu")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton comes with torch for CUDA")
kernels_run = pytest.mark.skipif(
    find_spec("triton") is None or not (ON_GPU or INTERPRETED),
    reason="needs Triton, and a GPU or the interpreter, in which another test runs this one",
)
POINTERS = {"groups": "*i64", "zeros": "*i32", "codes": "*u8"}
POINTERS |= dict.fromkeys(("target", "carried", "columns", "importance", "scales", "shrinks"), "*fp32")
POINTERS |= dict.fromkeys(("error", "loss", "weight"), "*fp32")
TYPES = POINTERS | {"top": "fp32", "middle": "fp32"}  # all others are i32
FIXED, FREE = {"static_groups": True}, {"desc_act": True}
CASES: list[tuple[int, int, dict[str, Any]]] = [  # columns, group size, and in which order
    (160, 16, {}),
    (96, 48, FREE),
    (192, 64, {}),
    (256, 128, FREE),
    (256, 128, FIXED),
    (272, 136, FREE),
    (512, 256, {}),
    (200, -1, {}),
    (1, 1, {}),
    (320, 32, FREE | FIXED),
    (512, 256, FREE | FIXED),
    (200, -1, FREE | FIXED),
]


def both(columns: int, **options: Any) -> tuple[GptqResult, GptqResult]:
    """What the loops for a GPU and the plain ones make of a weight with all that is unusual in one."""
    from mkaq.quantize import gptq_cuda

    weight, hessian = problem(columns=columns, rows=ROWS)
    if columns > 16:
        weight[3], weight[:, 7] = 0, 0
        hessian[5] = hessian[:, 5] = 0
    weight, hessian = weight.to(DEVICE), hessian.to(DEVICE)
    found = [gptq(weight, hessian, **options, kernels=kernels) for kernels in (gptq_cuda.TRITON, PLAIN)]
    return found[0], found[1]


def agree(own: GptqResult, plain: GptqResult) -> None:
    """Equal but for close calls, after which a row may differ; on a GPU torch divides in another way."""
    same = own.codes == plain.codes
    assert same.float().mean() >= (0.999 if DEVICE.type == "cpu" else 0.97)
    rows = same.all(1)
    assert rows.sum() >= ROWS - 3
    for name in ("scales", "zeros", "weight"):
        first, second = getattr(own, name), getattr(plain, name)
        assert first.dtype == second.dtype
        near = 0 if DEVICE.type == "cpu" else 2e-3  # a scale may be rounded to the next float16
        assert torch.allclose(first[rows].float(), second[rows].float(), rtol=near, atol=0), name
    assert torch.equal(own.g_idx, plain.g_idx)
    assert torch.allclose(own.errors[rows], plain.errors[rows], rtol=1e-3, atol=1e-5)


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for a tile of 16 rows as for one of 4."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr("mkaq.quantize.gptq_cuda._TILE", 16)


@kernels_run
@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("columns", "group_size", "order"), CASES)
def test_codes_are_those_of_the_plain_loops(
    columns: int, group_size: int, order: dict[str, bool], sym: bool
) -> None:
    agree(*both(columns, bits=4, group_size=group_size, sym=sym, **order))


@kernels_run
@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("static_groups", [True, False])
def test_codes_of_other_bits_are_too(bits: int, sym: bool, static_groups: bool) -> None:
    agree(*both(96, bits=bits, group_size=32, sym=sym, desc_act=True, static_groups=static_groups))


@kernels_run
def test_tiles_as_they_are_on_a_gpu() -> None:
    agree(*both(160, bits=4, group_size=32))


@kernels_run
@pytest.mark.parametrize("sym", [True, False])
def test_scales_of_awkward_rows_are_those_of_the_plain_search(sym: bool) -> None:
    from mkaq.quantize import gptq_cuda

    spread = (
        torch.randn(24, 32, generator=torch.Generator().manual_seed(2)) * torch.logspace(-9, 5, 24)[:, None]
    )
    for weight in (awkward_weight(), spread, spread.reshape(8, 3, 32)):
        given = weight.to(DEVICE), torch.linspace(0, 2, 32, device=DEVICE), 4, sym
        own, plain = gptq_cuda.find_scales(*given), PLAIN.find_scales(*given)
        assert [t.shape for t in own] == [t.shape for t in plain]
        same = (own[0] == plain[0]) & (own[1] == plain[1])
        assert same.float().mean() >= (1 if DEVICE.type == "cpu" else 0.8)


@needs_triton
@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the tests above run in this process")
def test_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-x", "tests/test_gptq_cuda.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{2 * len(CASES) + 15 + 2} passed" in done.stdout, done.stdout


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("width", [16, 128])
def test_kernels_compile_without_a_gpu(width: int, sym: bool) -> None:
    """What the interpreter takes Triton may refuse, and division is inexact unless it is asked not to be."""
    import triton
    from triton.backends.compiler import GPUTarget

    from mkaq.quantize import gptq_cuda

    fixed = {"SYM": sym, "ROWS": gptq_cuda._TILE, "WIDTH": width}
    for kernel, constants in (
        (gptq_cuda._search_rows, fixed),
        (gptq_cuda._round_rows, fixed | {"SEARCH": True}),
        (gptq_cuda._round_rows, fixed | {"SEARCH": False}),
    ):
        types = {name: TYPES.get(name, "i32") for name in kernel.arg_names}
        types |= dict.fromkeys(constants, "constexpr")
        source = triton.compiler.ASTSource(kernel, types, constants)
        code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(gptq_cuda._OPTIONS)).asm[
            "ptx"
        ]
        assert "div.rn.f32" in code
        assert not any(inexact in code for inexact in ("div.full", "div.approx", "fma.", ".ftz"))


@needs_triton
@pytest.mark.skipif(ON_GPU, reason="kernels can be compiled for this GPU")
def test_where_nothing_can_be_compiled_a_warning_says_so() -> None:
    from mkaq.quantize import gptq_cuda

    gptq_cuda.works_on.cache_clear()
    with pytest.warns(UserWarning, match="GPTQ is slow on cuda: Triton cannot compile there"):
        assert not gptq_cuda.works_on(torch.device("cuda"))


def test_loops_are_those_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, fused = torch.device("cuda", 0), object()
    assert solved.kernels_for(torch.device("cpu")) is NUMBA
    with pretended_gpu() as pretended:
        assert solved.kernels_for(pretended) is PLAIN
    for triton, version, works, expected in (
        (True, "13.0", True, fused),
        (True, "13.0", False, PLAIN),
        (False, "13.0", True, PLAIN),
        (True, None, True, PLAIN),
    ):
        module = SimpleNamespace(TRITON=fused, works_on=lambda _, works=works: works)
        monkeypatch.setitem(sys.modules, "mkaq.quantize.gptq_cuda", module)
        monkeypatch.setattr("mkaq.quantize.gptq_cuda", module, raising=False)
        monkeypatch.setattr(solved, "find_spec", lambda _, triton=triton: object() if triton else None)
        monkeypatch.setattr("torch.version.cuda", version)
        assert solved.kernels_for(cuda) is expected
