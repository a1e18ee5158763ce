"""What a layer should write to the residual stream, and the regression toward it.

The target of the attention is the output of the original's attention plus the error of the compressed stream
(original minus compressed); the target of the MLP is what remains. Every token is weighted by the inverse of
its mean square, because the norms of later layers divide by it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from mkaq.arch.arch import Arch
from mkaq.checkpoint.reader import Checkpoint
from mkaq.errors import UnsupportedError, UsageError
from mkaq.fit.hold_out import HELD_OUT, token_weights
from mkaq.fit.moments import Moments
from mkaq.fit.ridge import Fit, fit
from mkaq.ranks import Ranks
from mkaq.walk.batches import batches
from mkaq.walk.hooks import outputs_of
from mkaq.walk.walk import LayerWalk


def check_solvable(source: Checkpoint, samples: int, where: str, instead: str) -> None:
    """Refuses models and sample counts that do not allow a closed-form fit to the source's hidden states.

    Args:
        source: The model.
        samples: The number of calibration samples.
        where: The setting that requires the fit.
        instead: The alternative to suggest.

    Raises:
        UnsupportedError: If a norm lies between `o_proj` or `down_proj` and the residual stream, or attention
            and MLP run side by side.
        UsageError: If there are too few samples to hold some out.
    """
    if samples < HELD_OUT:
        raise UsageError(
            f"{samples} samples are too few to solve on some and measure on others",
            where="calibration.num_samples",
            fix=f"use at least {HELD_OUT}, better 128 or more",
        )
    if reason := unsolvable(source.arch):
        what = f"{source.config['model_type']} {reason}, so no closed form exists"
        raise UnsupportedError(what, where=where, fix=f"use {instead}")


def unsolvable(arch: Arch) -> str | None:
    """Why a family has no closed form for what its layers write; None if it has one."""
    if arch.parallel:
        return "runs attention and MLP side by side"
    return "normalizes what its layers write" if arch.written_norms else None


def advance(
    walk: LayerWalk,
    group: Sequence[int],
    writer: str,
    original: torch.Tensor,
    compressed: torch.Tensor,
    attended: torch.Tensor,
) -> None:
    """Moves the original stream past the group; fills `attended` with the target of the new attention.

    The target is the sum of the outputs of the group's attentions in the original and the error of the
    compressed stream, in float32: in a shorter dtype the difference of two streams would be mostly rounding.
    """
    for target, *streams in zip(batches(attended), batches(original), batches(compressed), strict=True):
        before, now = map(walk.to_device, streams)
        target.copy_(before.float() - now.float())
        walk.activations.release()
    for index in group:
        with walk.layer(index) as layer, outputs_of(layer.get_submodule(writer)) as seen:
            for states, target in zip(batches(original), batches(attended), strict=True):
                states.copy_(walk.run(layer, index, states))
                target.copy_(walk.to_device(target) + seen.pop())
                walk.activations.release()


def fit_together(
    ranks: Ranks, moments: Moments, held_out: Moments, prior: torch.Tensor, nearly: float
) -> Fit:
    """`fit` in the first process, shared with all processes."""
    if not ranks.is_main:
        ridge, before, error = ranks.broadcast()
        weight = torch.empty(prior.shape, device=prior.device)
        return Fit(ridge, before, error, ranks.broadcast_tensor(weight))
    own = fit(moments, held_out, prior, nearly)
    ranks.broadcast((own.ridge, own.error_before, own.error))
    return replace(own, weight=ranks.broadcast_tensor(own.weight.contiguous()))


def moments_of(walk: LayerWalk, features: int) -> Moments:
    """Empty moments of a regression from `features` features to the hidden state."""
    return Moments(features, walk.checkpoint.sizes.hidden, walk.device)


def add_rows(moments: Moments, features: torch.Tensor, target: torch.Tensor, final: torch.Tensor) -> None:
    """Adds tokens to moments, each weighted by the inverse mean square of its hidden state in `final`."""
    moments.add(features.flatten(0, -2), target.flatten(0, -2), token_weights(final).reshape(-1))


def add_up(ranks: Ranks, *moments: Moments) -> None:
    """Sums the moments of all processes, so that each has those of all tokens."""
    for sums in moments:
        energy = torch.tensor([sums.energy], dtype=torch.float64, device=sums.gram.device)
        ranks.all_reduce(sums.gram, sums.cross, energy)
        sums.energy = float(energy)


def without_bias(target: torch.Tensor, tensors: Mapping[str, torch.Tensor], writer: str) -> torch.Tensor:
    """A target minus the bias of a linear layer, if it has one."""
    bias = tensors.get(f"{writer}.bias")
    return target if bias is None else target - bias.to(target.device, target.dtype)
