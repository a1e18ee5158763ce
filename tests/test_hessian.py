"""The Hessian is X^T X to far more digits than a product in bfloat16 has, whoever adds which batch."""

from dataclasses import dataclass, field

import pytest
import torch

from mkaq.quantize.hessian import HessianSum
from mkaq.ranks import Ranks

CPU = torch.device("cpu")


def made(tokens: int, features: int) -> torch.Tensor:
    """Correlated rows with a mean, as norms give them."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(features, features, generator=generator) * torch.logspace(-2, 0, features)
    return (torch.randn(tokens, features, generator=generator) @ mix + 0.5).bfloat16()


def error(found: torch.Tensor, rows: torch.Tensor) -> float:
    """The largest, as a share of the norms of the two columns."""
    exact = rows.double().T @ rows.double()
    norms = exact.diagonal().sqrt()
    return float(((found.double() - exact) / norms / norms[:, None]).abs().max())


@pytest.mark.parametrize("features", [64, 300, 1500])
@pytest.mark.parametrize("tokens", [8 * 512, 8 * 512 - 100])
def test_bfloat16_rows_lose_little(features: int, tokens: int) -> None:
    rows = made(tokens, features)
    total = HessianSum(features, CPU)
    for batch in rows.split(512):
        total.add(batch)
    found = total.whole()
    assert torch.equal(found, found.T)
    assert error(found, rows) < 5e-4  # one product is rounded to 2e-3


def test_other_types_are_multiplied_in_float32() -> None:
    rows = made(512, 64)
    for given in (rows.float(), rows.double()):
        total = HessianSum(64, CPU)
        total.add(given[:200])
        total.add(given[200:])
        assert error(total.whole(), rows) < 1e-6


@dataclass(frozen=True)
class Pretended(Ranks):
    """The second of two processes: what the first one says and adds is there already."""

    first: list[torch.Tensor] = field(default_factory=list)
    others: list[torch.Tensor] = field(default_factory=list)

    def broadcast_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(self.first.pop(0))

    def all_reduce(self, *tensors: torch.Tensor) -> None:
        for tensor, other in zip(tensors, self.others, strict=True):
            tensor += other


@dataclass(frozen=True)
class Overheard(Ranks):
    """The first of two processes, whose words are kept."""

    first: list[torch.Tensor] = field(default_factory=list)
    sums: list[torch.Tensor] = field(default_factory=list)

    def broadcast_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        self.first.append(tensor.clone())
        return tensor

    def all_reduce(self, *tensors: torch.Tensor) -> None:
        self.sums.extend(tensor.clone() for tensor in tensors)


def test_processes_that_share_the_batches_come_to_the_same() -> None:
    """Bit for bit, all but a few entries whose batches give very unlike numbers."""
    rows = made(6 * 512, 300)
    alone = HessianSum(300, CPU)
    for batch in rows.split(512):
        alone.add(batch)
    one = Overheard()
    first = HessianSum(300, CPU, one)
    for batch in rows[: 2 * 512].split(512):
        first.add(batch)
    first.whole()
    second = HessianSum(300, CPU, Pretended(first=one.first, others=one.sums))
    for batch in rows[2 * 512 :].split(512):
        second.add(batch)
    found, expected = second.whole(), alone.whole()
    assert float((found != expected).float().mean()) < 2e-3
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6 * float(expected.diagonal().mean()))
