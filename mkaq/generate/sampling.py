"""How the next token is chosen."""

from typing import NamedTuple


class Sampling(NamedTuple):
    """How the next token is chosen; the filters are those of transformers, in its order.

    Attributes:
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Only so many likeliest tokens; 0 for all.
        top_p: Only the likeliest tokens that together have this probability.
        min_p: Only tokens at least this likely, as a part of the likeliest one's probability.
        seed: Seed of the draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
