"""The divergence of a model from predictions of which only the likeliest tokens are known."""

from typing import NamedTuple

import torch

LOGITS = 1 << 24  # numbers at once


class Predictions(NamedTuple):
    """What a model predicts: its likeliest tokens, and the rest as one.

    Attributes:
        ids: Token ids, shape (tokens, k), int32.
        log_probs: The logarithms of their probabilities, float16, of the same shape.
        rest: The logarithm of the probability of all other tokens, shape (tokens,), float16; minus infinity
            if there are none.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    rest: torch.Tensor

    def to(self, device: torch.device) -> "Predictions":
        """The same on a device."""
        return Predictions(*(tensor.to(device) for tensor in self))


def likeliest(logits: torch.Tensor, k: int) -> Predictions:
    """The k likeliest tokens of each prediction.

    Args:
        logits: Shape (tokens, vocabulary).
        k: How many.
    """
    log_probs = logits.float().log_softmax(-1)
    top = log_probs.topk(k, sorted=True)
    rest = log_probs.exp_().scatter_(-1, top.indices, 0.0).sum(-1).log_()
    return Predictions(top.indices.int(), top.values.half(), rest.half())


def divergence(logits: torch.Tensor, told: Predictions) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(source || model) with all tokens that are not among the likeliest as one, and its slope.

    sum p log(p / q) + (1 - sum p) log((1 - sum p) / (1 - sum q)), p rounded to float16 and scaled to a sum
    of 1. A lower bound of the divergence over the whole vocabulary; 0 only where both agree on it.

    Args:
        logits: The model's, shape (tokens, vocabulary).
        told: The source's predictions of the same tokens, on the same device.

    Returns:
        The divergence in nats, shape (tokens,), and its derivative by the logits, shape (tokens, vocabulary);
        both float32.
    """
    ids = told.ids.long()
    log_p = torch.cat([told.log_probs, told.rest[:, None]], -1).float().log_softmax(-1)
    log_q = logits.float().log_softmax(-1)
    own, q = log_q.gather(-1, ids), log_q.exp_()
    likely = q.gather(-1, ids)
    rest = q.scatter_(-1, ids, 0.0).sum(-1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
    p, own = log_p.exp(), torch.cat([own, rest.log()], -1)
    apart = torch.where(p > 0, p * (log_p - own), 0.0).sum(-1)
    # by a logit among the likeliest: q - p; by another: q - p_rest q / q_rest
    return apart, q.mul_(1 - p[:, -1:] / rest).scatter_(-1, ids, likely - p[:, :-1])


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-log of the probability of the text's next token, and its slope; shapes as for `divergence`.

    Args:
        logits: The model's, shape (tokens, vocabulary).
        labels: The next tokens, shape (tokens,), int64.
    """
    log_q = logits.float().log_softmax(-1)
    loss = -log_q.gather(-1, labels[:, None])[:, 0]
    slope = log_q.exp_()
    return loss, slope.scatter_add_(-1, labels[:, None], torch.full_like(slope[:, :1], -1.0))
