"""The Hessian of GPTQ: X^T X over all calibration tokens, the same for any number of processes."""

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
            self._reference.append(self._ranks.from_first(rows[:, start:stop].T @ rows[:, start:]))
        self._reference_tokens = int(self._ranks.from_first(torch.tensor(len(rows))))

    def whole(self) -> torch.Tensor:
        """The sum over all batches of all processes, shape (features, features), float32."""
        self._ranks.add(self._sum, self._subtracted)
        for (start, stop), reference in zip(stripes(len(self._sum)), self._reference, strict=False):
            self._sum[start:stop, start:].add_(reference, alpha=int(self._subtracted))
        mirror(self._sum)
        return self._sum
