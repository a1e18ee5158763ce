"""How long each kind of work takes on this machine: the real things, run on a small piece.

A stage's time is the sum of its work (`work.py`) times these rates. `benchmarks/plan_times.py` compares the
result with measured runs.
"""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from mkaq.checkpoint.reader import Checkpoint
from mkaq.fit.gram import factorize
from mkaq.ranks import ALONE
from mkaq.run.estimate import Work
from mkaq.walk.batches import TOKENS_PER_BATCH
from mkaq.walk.device import compute_dtype
from mkaq.walk.walk import LayerWalk

_ENOUGH = 0.05  # seconds after which a repetition stops
_OPERATIONS = 1e11  # of a layer's piece
_LARGEST = 4096  # rows and columns of the matrices that are multiplied and factorized
_FILE = 1 << 25  # bytes


class Rehearsal:
    """Times the kinds of work of a model, each once, when it is first needed.

    Args:
        source: The model; one of its layers is read.
        device: Where layers run.
        length: Tokens per calibration sample.
        folder: An existing folder on the disk of the run.
    """

    def __init__(self, source: Checkpoint, device: torch.device, length: int, folder: Path) -> None:
        self._source, self._device, self._length, self._folder = source, device, length, folder
        self._rates: dict[str, float] = {}

    def seconds(self, work: Work) -> float:
        """How long work takes."""
        amounts: dict[str, float] = asdict(work)
        return sum(amount * self._rate(kind) for kind, amount in amounts.items() if amount)

    def _rate(self, kind: str) -> float:
        """Seconds per unit of a field of `Work`."""
        if kind not in self._rates:
            measure: Callable[[], float] = getattr(self, f"_{kind}")
            self._rates[kind] = measure()
        return self._rates[kind]

    def _exact(self) -> float:
        return self._forward(fast=False)

    def _fast(self) -> float:
        return self._forward(fast=True)

    def _forward(self, *, fast: bool) -> float:
        """Seconds per token of a layer's forward pass."""
        walk, layer = self._placed(fast=fast)
        states = self._states.to(walk.dtype)

        @torch.no_grad()
        def run() -> None:
            walk.checked(walk.run(layer, self._index, states), self._index)

        return self._time(run) / states[..., 0].numel()

    def _tuned(self) -> float:
        """Seconds per token of a layer's forward and backward pass."""
        walk, layer = self._placed(tuned=True)
        layer.float().requires_grad_(True)
        target = torch.zeros_like(self._states)

        def run() -> None:
            with walk.autocast():
                output = walk.run(layer, self._index, self._states)
            (output.float() - target).square().mean().backward()  # type: ignore[no-untyped-call]

        return self._time(run) / target[..., 0].numel()

    def _stepped(self) -> float:
        """Seconds per weight of an optimizer step."""
        weights = [nn.Parameter(torch.ones(t.shape, device=self._device)) for t in self._tensors.values()]
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer = torch.optim.AdamW(weights, 1e-6, weight_decay=0.0)

        def run() -> None:
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()

        return self._time(run) / sum(weight.numel() for weight in weights)

    def _placed(self, *, fast: bool = False, tuned: bool = False) -> tuple[LayerWalk, nn.Module]:
        dtype = compute_dtype(self._source.dtype, self._device, fast=fast)
        walk = LayerWalk(self._source, self._device, dtype)
        if fast:
            walk.use_fast_attention()
        if tuned and self._device.type == "cpu":
            walk.use_eager_attention()
        return walk, walk.assemble(self._index, self._tensors)

    def _logits(self) -> float:
        """Seconds per token of the head, whose rows are as many as fit into a small matrix."""
        sizes, tokens = self._source.sizes, 512
        rows = min(sizes.vocabulary, _LARGEST)
        states = torch.ones(tokens, sizes.hidden, device=self._device)
        weight = torch.ones(rows, sizes.hidden, device=self._device)

        def run() -> None:
            (states @ weight.T).log_softmax(-1).exp()

        return self._time(run) / tokens * sizes.vocabulary / rows

    def _products(self) -> float:
        """Seconds per operation of a product in float32."""
        rows, columns = 1024, min(self._source.sizes.intermediate, _LARGEST)
        left = torch.ones(rows, columns, device=self._device)
        return self._time(lambda: left.T @ left) / (2 * rows * columns**2)

    def _factors(self) -> float:
        """Seconds per operation of a Cholesky factor in float32."""
        columns = min(self._source.sizes.intermediate, _LARGEST)
        matrix = torch.full((columns, columns), 0.5, device=self._device).fill_diagonal_(columns)
        return self._time(lambda: factorize(matrix.clone())) / (columns**3 / 3)

    def _rounded(self) -> float:
        """Seconds per weight of GPTQ's loops."""
        from mkaq.quantize.gptq import gptq
        from mkaq.quantize.solved import kernels_for

        weight = torch.linspace(-1, 1, 512 * 1024, device=self._device).reshape(512, 1024)
        hessian = torch.eye(1024, device=self._device)
        kernels, fast = kernels_for(self._device), ALONE.has_fast_bfloat16(self._device)

        def run() -> None:
            gptq(weight, hessian, bits=4, group_size=128, kernels=kernels, fast=fast)

        return self._time(run) / weight.numel()

    def _coded(self) -> float:
        """Seconds per weight of bitsandbytes."""
        from mkaq.quantize.bnb import quantize_linear

        config = {"load_in_8bit": False, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False}
        weight = torch.linspace(-1, 1, 1 << 20).reshape(1024, 1024)
        return self._time(lambda: quantize_linear(weight, config, self._device)) / weight.numel()

    def _written(self) -> float:
        """Seconds per byte that is hashed and written; 0 where nothing may be written, as a run will say."""
        import hashlib

        data = bytes(_FILE)

        def run() -> None:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                file.write(data)
                hashlib.sha256(data)
                os.fsync(file.fileno())

        try:
            return self._time(run) / _FILE
        except OSError:
            return 0.0

    @cached_property
    def _index(self) -> int:
        return self._source.num_layers // 2

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        return LayerWalk(self._source, self._device).layer_tensors(self._index)

    @cached_property
    def _states(self) -> torch.Tensor:
        """As many samples as a batch has, or as a second allows."""
        weights = sum(tensor.numel() for tensor in self._tensors.values())
        count = min(TOKENS_PER_BATCH, _OPERATIONS / (2 * weights)) // self._length
        shape = (max(1, int(count)), self._length, self._source.sizes.hidden)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self._device)

    def _time(self, run: Callable[[], object]) -> float:
        """The median time of a function, which is first run once."""
        times: list[float] = []
        self._timed(run)
        while sum(times) < _ENOUGH:
            times.append(self._timed(run))
        return sorted(times)[len(times) // 2]

    def _timed(self, run: Callable[[], object]) -> float:
        began = time.perf_counter()
        run()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - began
