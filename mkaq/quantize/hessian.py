"""The Hessian of GPTQ: X^T X over all calibration tokens, the same for any number of processes."""

from collections.abc import Iterable

import torch

from mkaq.fit.gram import add_gram, mirror, stripes
from mkaq.ranks import ALONE, Ranks


class HessianSum:
    """X^T X, added up batch by batch.

    On a CPU bfloat16 rows are multiplied in bfloat16. Products are accumulated in float32, but the result is
    rounded to bfloat16. To lose fewer digits, the product P of the first process's first batch is subtracted
    before the rounding: each batch adds X^T X - P, and P is added back, times the number of batches, in
    `whole`. A batch of another size uses its own rounded product instead of P. P is the same in all
    processes, and float32 sums of such short numbers are practically exact, so the result does not depend on
    which process has which batches.

    Args:
        features: Columns of X.
        device: The device of the rows.
        ranks: The processes; each adds at least one batch.
    """

    def __init__(self, features: int, device: torch.device, ranks: Ranks = ALONE) -> None:
        self._sum = torch.zeros(features, features, device=device)
        self._ranks = ranks
        self._reference: list[torch.Tensor] = []  # P, by stripes
        self._reference_tokens = 0  # tokens of its batch
        self._subtracted = torch.zeros((), dtype=torch.int64, device=device)  # how often P was subtracted

    def add(self, rows: torch.Tensor) -> None:
        """Adds a batch, shape (tokens, features)."""
        if rows.dtype != torch.bfloat16 or rows.device.type != "cpu":
            add_gram(self._sum, rows)
            return
        if not self._reference:
            self._set_reference(rows)
        same_size = len(rows) == self._reference_tokens
        for (start, stop), reference in zip(stripes(rows.shape[1]), self._reference, strict=True):
            left, right, total = rows[:, start:stop].T, rows[:, start:], self._sum[start:stop, start:]
            if not same_size:
                reference = left @ right
                total += reference
            total += torch.addmm(reference, left, right, beta=-1)
        self._subtracted += same_size

    def _set_reference(self, rows: torch.Tensor) -> None:
        for start, stop in stripes(rows.shape[1]):
            self._reference.append(self._ranks.broadcast_tensor(rows[:, start:stop].T @ rows[:, start:]))
        self._reference_tokens = int(self._ranks.broadcast_tensor(torch.tensor(len(rows))))

    def whole(self) -> torch.Tensor:
        """The sum over all batches of all processes, shape (features, features), float32."""
        self._ranks.all_reduce(self._sum, self._subtracted)
        for (start, stop), reference in zip(stripes(len(self._sum)), self._reference, strict=False):
            self._sum[start:stop, start:].add_(reference, alpha=int(self._subtracted))
        mirror(self._sum)
        return self._sum


def hessian_of(
    inputs: Iterable[torch.Tensor], features: int, device: torch.device, dtype: torch.dtype, ranks: Ranks
) -> torch.Tensor:
    """X^T X over the inputs of all processes, shape (features, features), float32.

    Args:
        inputs: This process's batches, the last dimension the features; there may be none.
        features: Columns of X.
        device: Where the inputs lie.
        dtype: Their type.
        ranks: The processes.
    """
    total, empty = HessianSum(features, device, ranks), True
    for batch in inputs:
        total.add(batch.flatten(0, -2))
        empty = False
    if empty:  # without samples too, a process must take part in the exchange of `add`
        total.add(torch.empty(0, features, dtype=dtype, device=device))
    return total.whole()
