"""The Hessian of GPTQ: X^T X over all calibration tokens, of several processes the same as of one."""

import torch

from mkaq.fit.gram import add_gram, mirror, stripes
from mkaq.ranks import ALONE, Ranks


class HessianSum:
    """X^T X, added up batch by batch.

    On a CPU bfloat16 rows are multiplied as such. Their product is summed in float32 but comes rounded
    to bfloat16, so what the first batch of the first process gave is taken off every other one's product
    before it is rounded: only the difference, a small part of the whole, loses digits. What is taken off
    is the same for all, and sums of such short numbers are as good as exact, so the result does not
    depend on which process has which of the batches.

    Args:
        features: Columns of X.
        device: Of the rows.
        ranks: The processes; each adds at least one batch.
    """

    def __init__(self, features: int, device: torch.device, ranks: Ranks = ALONE) -> None:
        self._sum = torch.zeros(features, features, device=device)
        self._ranks = ranks
        self._usual: list[torch.Tensor] = []  # what is taken off, a stripe each
        self._usual_tokens = 0  # of the batch that gave it
        self._taken_off = torch.zeros((), dtype=torch.int64, device=device)  # how often

    def add(self, rows: torch.Tensor) -> None:
        """Adds a batch, shape (tokens, features)."""
        if rows.dtype != torch.bfloat16 or rows.device.type != "cpu":
            add_gram(self._sum, rows)
            return
        if not self._usual:
            self._agree(rows)
        usual = len(rows) == self._usual_tokens
        for (start, stop), expected in zip(stripes(rows.shape[1]), self._usual, strict=True):
            left, right, total = rows[:, start:stop].T, rows[:, start:], self._sum[start:stop, start:]
            if not usual:
                expected = left @ right
                total += expected
            total += torch.addmm(expected, left, right, beta=-1)
        self._taken_off += usual

    def _agree(self, rows: torch.Tensor) -> None:
        for start, stop in stripes(rows.shape[1]):
            self._usual.append(self._ranks.from_first(rows[:, start:stop].T @ rows[:, start:]))
        self._usual_tokens = int(self._ranks.from_first(torch.tensor(len(rows))))

    def whole(self) -> torch.Tensor:
        """The sum over all batches of all processes, shape (features, features), float32."""
        self._ranks.add(self._sum, self._taken_off)
        for (start, stop), expected in zip(stripes(len(self._sum)), self._usual, strict=False):
            self._sum[start:stop, start:].add_(expected, alpha=int(self._taken_off))
        mirror(self._sum)
        return self._sum
