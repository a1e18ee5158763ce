"""The moments of a weighted regression, which represent any number of tokens.

A weight W that maps features z (the channels of a layer) to a target r minimizes sum_t w_t |r_t - W z_t|^2 +
ridge * mean(diag G) * |W - W0|^2, where W0 is the previous weight. Only the moments G = sum w z z^T, B = sum
w z r^T and sum w |r|^2 are kept. They take the same memory for any number of tokens, and they give the error
of any W on held-out tokens without another pass over them.
"""

import torch

from mkaq.fit.gram import add_gram, factorize, mirror


class Moments:
    """The moments of a weighted regression, in float32: the products round as much as the sums.

    Args:
        features: The number of features.
        targets: The number of targets.
        device: Where the moments lie.

    Attributes:
        cross: sum w z r^T, shape (features, targets).
        energy: sum w |r|^2.
    """

    def __init__(self, features: int, targets: int, device: torch.device) -> None:
        self._gram = torch.zeros(features, features, device=device)
        self._upper_only = False  # whether only its upper triangle is up to date
        self.cross = torch.zeros(features, targets, device=device)
        self.energy = 0.0

    def add(self, features: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> None:
        """Adds tokens.

        Args:
            features: Shape (tokens, features).
            targets: Shape (tokens, targets).
            weights: Weights of the tokens, shape (tokens,).
        """
        root = weights.float().sqrt().unsqueeze(1)
        z, r = features.float() * root, targets.float() * root
        self.cross.addmm_(z.T, r)
        self.energy += float(r.double().square().sum())
        add_gram(self._gram, z)
        self._upper_only = True

    @property
    def gram(self) -> torch.Tensor:
        """sum w z z^T, shape (features, features)."""
        if self._upper_only:
            mirror(self._gram)
            self._upper_only = False
        return self._gram

    def select(self, columns: torch.Tensor) -> "Moments":
        """The moments of some of the features."""
        chosen = Moments(0, 0, self.gram.device)
        chosen._gram, chosen.cross = self.gram[columns][:, columns], self.cross[columns]
        chosen.energy = self.energy
        return chosen

    def every(self, step: int) -> "Moments":
        """The moments of every `step`-th target, for `change` alone."""
        chosen = Moments(0, 0, self.gram.device)
        chosen._gram, chosen.cross = self.gram, self.cross[:, ::step]
        return chosen

    def change(self, weight: torch.Tensor) -> float:
        """sum w |r - W z|^2 - sum w |r|^2 for a weight W, shape (targets, features)."""
        w = weight.float()
        return float((w @ self.gram).sub_(self.cross.T, alpha=2).mul_(w).double().sum())

    def error(self, weight: torch.Tensor) -> float:
        """sum w |r - W z|^2 / sum w |r|^2 for a weight W, shape (targets, features)."""
        return max(0.0, 1 + self.change(weight) / self.energy) if self.energy > 0 else 0.0


def damped_factor(gram: torch.Tensor, ridge: float) -> torch.Tensor | None:
    """The lower Cholesky factor of G + ridge * mean(diag G) * I; None if it is not positive definite."""
    damped = gram.clone()
    damped.diagonal().add_(ridge * gram.diagonal().mean().clamp(min=1e-30))
    return factorize(damped)
