"""Calibration tokens in random order, so that weights fitted to one domain still serve others."""

import numpy as np
import torch

SHUFFLED = 4  # of so many sequences the last one is put in random order


def part_in_random_order(tokens: torch.Tensor, seed: int) -> torch.Tensor:
    """Calibration tokens with every fourth sequence in random order.

    A fit to text of one domain forgets what other text needs. The same tokens in random order prevent that;
    more of them would leave less of the text itself to learn from.

    Args:
        tokens: Shape (samples, length).
        seed: The seed of the order.
    """
    result = tokens.clone()
    result[SHUFFLED - 1 :: SHUFFLED] = in_random_order(tokens[SHUFFLED - 1 :: SHUFFLED], seed)
    return result


def in_random_order(tokens: torch.Tensor, seed: int) -> torch.Tensor:
    """Every sequence in random order, except for a first token that all sequences share.

    Args:
        tokens: Shape (samples, length).
        seed: The seed of the order.
    """
    result = tokens.numpy().copy()
    first = int(bool((result[:, :1] == result[:1, :1]).all()))
    result[:, first:] = np.random.default_rng(seed).permuted(result[:, first:], axis=1)
    return torch.from_numpy(result)


def probing_tokens(tokens: torch.Tensor, seed: int) -> torch.Tensor:
    """Tokens that show whether a model still behaves like another one, in its domain and outside it.

    Args:
        tokens: Shape (samples, length).
        seed: The seed of the random phrases.

    Returns:
        Shape (2 * samples, length): the sequences, and for each one a random phrase of its tokens, a quarter
        of its length, repeated to the end. Models copy repetitions in any text (Olsson et al., In-context
        learning and induction heads, 2022).
    """
    repeated = in_random_order(tokens, seed)
    phrase = max(1, tokens.shape[1] // 4)
    for start in range(phrase, tokens.shape[1], phrase):
        rest = repeated[:, start : start + phrase]
        rest[:] = repeated[:, : rest.shape[1]]
    return torch.cat([tokens, repeated])
