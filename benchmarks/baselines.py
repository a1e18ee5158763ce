"""Published ways to remove layers without training, on mkaq's own walk: what merging is compared with.

Each chooses layers from calibration tokens (integers, shape (samples, length)). The answer is the
list of the layers that are kept, but for `sleb` (the order in which layers go), `laco` (each new
layer as a sum of old ones) and `replaceme` (also a changed weight). `write_checkpoint` makes a model
of any of them.

Hidden states are numbered as in the papers: state 0 is the embedding, state l the input of layer l and
the last one the output of the last layer, before the final norm.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn

from mkaq.checkpoint.output import cast
from mkaq.checkpoint.reader import Checkpoint
from mkaq.checkpoint.side_files import copy_side_files
from mkaq.checkpoint.writer import ShardWriter
from mkaq.files import write_json
from mkaq.merge.average import merge_layers
from mkaq.merge.write import merged_config
from mkaq.progress import Progress
from mkaq.walk.batches import batches
from mkaq.walk.walk import LayerWalk

Tensors = dict[str, torch.Tensor]
Weights = dict[int, float]
SHARD_SIZE = 4 * 10**9


def reverse_order(num_layers: int, removed: int) -> list[int]:
    """Drops the deepest layers: the "reverse-order" pruning that ShortGPT is compared with.

    Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect"
    (arXiv 2403.03853), which ranks a layer as the less important the deeper it is.
    """
    return list(range(num_layers - removed))


def shortgpt(walk: LayerWalk, tokens: torch.Tensor, removed: int) -> list[int]:
    """Drops the layers of least Block Influence, BI_i = 1 - E[cos(h_i, h_i+1)] over all tokens.

    Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect"
    (arXiv 2403.03853, eq. 1). All influences are measured once, on the whole model.
    """
    influence, states = list[float](), _states(walk, tokens)
    before = next(states).clone()
    for after in states:
        influence.append(1 - torch.cosine_similarity(before, after, dim=-1).double().mean().item())
        before.copy_(after)
    return _without(walk.num_layers, sorted(range(walk.num_layers), key=influence.__getitem__)[:removed])


def contiguous(walk: LayerWalk, tokens: torch.Tensor, removed: int) -> list[int]:
    """Drops the block of layers whose input and output are at the smallest angle.

    Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887): for n
    layers, the l that minimizes arccos(cos(h_l, h_l+n)) / pi at the last token of each sequence,
    averaged over the sequences. Without the paper's healing by QLoRA.
    """

    def angle(start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        return torch.cosine_similarity(start, end, dim=-1).clamp(-1, 1).arccos() / math.pi

    block = _closest_block(_last_tokens(walk, tokens), removed, range(walk.num_layers - removed + 1), angle)
    return _without(walk.num_layers, block)


def sleb(walk: LayerWalk, tokens: torch.Tensor, removed: int, progress: Progress | None = None) -> list[int]:
    """Removes one layer after another, each time the one without which perplexity is lowest.

    Song et al., "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of
    Transformer Blocks" (arXiv 2402.09025): the paper's third metric, measured anew on the model
    that is left. The whole model is in memory; a trial starts from the state before its layer.

    Returns:
        The removed layers in their order, so that the first n of them are the answer for n.
    """
    kept, order, embedded = list(range(walk.num_layers)), list[int](), walk.embed(tokens)
    with _all_layers(walk) as layers, walk.head() as head:
        for _ in (progress or Progress(quiet=True)).track(range(removed), "sleb"):
            losses, prefix = {}, embedded.clone()
            for at, index in enumerate(kept):
                states = prefix.clone()
                for later in kept[at + 1 :]:
                    walk.run_all(layers[later], later, states)
                losses[index] = _loss(head, tokens, states)
                walk.run_all(layers[index], index, prefix)
            order.append(min(losses, key=losses.__getitem__))
            kept.remove(order[-1])
    return order


def laco(
    walk: LayerWalk,
    tokens: torch.Tensor,
    removed: int,
    *,
    together: int = 4,
    interval: int = 2,
    lowest: int = 1,
) -> list[Weights]:
    """Collapses layers into earlier ones, from the deepest up, while the model's output stays similar.

    Yang et al., "LaCo: Large Language Model Pruning via Layer Collapse" (arXiv 2402.11187, EMNLP
    Findings 2024), algorithm 1. The paper tunes the similarity threshold T by hand for each model.
    Here T starts at 1, and as long as a pass from the original model removes too few layers, T falls to
    the largest similarity that this pass rejected: the highest T that removes enough. The merge that
    reaches the number takes no more layers than it needs. Similarity is the paper's: the cosine of
    the two models' last representations (after the final norm) of a whole sequence, averaged.

    Merges may overlap, and then merge what was merged. The whole model is in memory, and the
    inputs of all its layers: few tokens are enough (the paper takes ten sentences).

    Args:
        walk: The model, not quantized.
        tokens: Calibration tokens, shape (samples, length).
        removed: How many layers.
        together: The paper's C: layers that become one.
        interval: The paper's I: how far the next merge starts before an accepted one.
        lowest: The paper's L: the first layer that may be collapsed into.

    Returns:
        For each new layer the old ones and their weights, which sum to 1. The first of the old
        layers has the place that the new one takes.

    Raises:
        ValueError: If no threshold removes so many.
    """
    count, threshold, known = walk.num_layers, 1.0, dict[str, float]()
    inputs = [states.clone() for states in _states(walk, tokens)]
    with _all_layers(walk) as layers, walk.final_norm() as norm:

        def similarity(groups: Sequence[Weights]) -> float:
            if (key := str(groups)) not in known:
                outputs = (inputs[-1], _output(walk, layers, groups, inputs))
                new, old = (norm(states).flatten(1) for states in outputs)
                known[key] = torch.cosine_similarity(new, old).mean().item()
            return known[key]

        while threshold > -math.inf:
            groups, threshold = _collapse(
                similarity, count, removed, threshold, together=together, interval=interval, lowest=lowest
            )
            if len(groups) == count - removed:
                return groups
    raise ValueError(f"LaCo cannot remove {removed} of {count} layers, {together} together from {lowest} on")


def laco_weights(groups: Sequence[Weights]) -> Weights:
    """Merges neighbouring groups into the first: theta_l + sum over k of (theta_l+k - theta_l).

    Yang et al., LaCo (arXiv 2402.11187), "reserving-differences-while-seeking-common". Of m + 1
    layers the first gets weight 1 - m and the others 1: of two layers only the later is left. The
    notebook published with the paper subtracts the running sum instead, which leaves of any number
    only the last layer (its linear weights, between the norms of the first).
    """
    first, *others = groups
    result = {old: weight * (1 - len(others)) for old, weight in first.items()}
    return result | {old: weight for group in others for old, weight in group.items()}


def laco_layer(tensors: Mapping[int, Tensors], weights: Weights) -> Tensors:
    """A new layer of `laco`, in float32, with every tensor (norms and biases too) summed alike.

    Args:
        tensors: For each old layer its tensors by their names below the layer.
        weights: For each old layer its weight.
    """
    return merge_layers(lambda old: {n: t.float() for n, t in tensors[old].items()}, weights)


def replaceme(walk: LayerWalk, tokens: torch.Tensor, removed: int) -> tuple[list[int], dict[int, Tensors]]:
    """Cuts a block of layers and lets the MLP before it make up for them, by a linear map.

    Shopkhoev et al., "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block
    Linearization" (arXiv 2505.02819), by least squares without regularization. The block of n layers
    is the one with the smallest cosine distance between its input and its output, at the last token
    of each sequence as in the published code. With M the MLP output of the layer before it and Y the
    rest of that layer's output, T = argmin |M T + Y - output of the block| over all tokens is
    multiplied into `down_proj`.

    Returns:
        The layers that are kept, and the changed tensors of the one before the cut.

    Raises:
        ValueError: If the family has a norm after the MLP.
    """
    if any("post_feedforward_layernorm" in name for name in walk.checkpoint.layer_tensor_names(0)):
        raise ValueError("ReplaceMe needs an MLP that ends in down_proj; this family has a norm after it")

    def distance(start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        return 1 - torch.cosine_similarity(start, end, dim=-1)

    starts = range(1, walk.num_layers - removed + 1)  # a layer stays before the block
    block = _closest_block(_last_tokens(walk, tokens), removed, starts, distance)
    transform, before = _linear_map(walk, tokens, block), block.start - 1
    changed = {
        name: (transform.T @ tensor.to(transform)).float()
        for name, tensor in walk.layer_tensors(before).items()
        if name.startswith("mlp.down_proj.")
    }
    return _without(walk.num_layers, block), {before: changed}


def kept_layers(
    walk: LayerWalk, kept: Iterable[int], changed: Mapping[int, Tensors] | None = None
) -> Iterator[tuple[int, Tensors]]:
    """Layers as they are, but for the tensors in `changed`, one in memory at a time."""
    for old in kept:
        yield old, walk.layer_tensors(old) | (changed or {}).get(old, {})


def laco_layers(walk: LayerWalk, groups: Iterable[Weights]) -> Iterator[tuple[int, Tensors]]:
    """The layers that `laco` gives, with one group in memory at a time."""
    for weights in groups:
        yield min(weights), laco_layer({old: walk.layer_tensors(old) for old in weights}, weights)


def write_checkpoint(
    source: Checkpoint, layers: Iterable[tuple[int, Tensors]], folder: Path, dtype: torch.dtype
) -> None:
    """Writes a checkpoint with the embedding and the head of `source` and other layers.

    Args:
        source: Not quantized.
        layers: For each new layer the old one whose place in the configuration it takes, and its
            tensors by their names below the layer.
        folder: Where it goes; made if it is not there.
        dtype: Of the new checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    places = []
    with ShardWriter(folder, SHARD_SIZE) as writer:
        for name, tensor in source.each(source.outer_tensor_names):
            writer.add(name, cast(tensor, dtype, name))
        for new, (old, tensors) in enumerate(layers):
            places.append(old)
            for name, tensor in tensors.items():
                writer.add(source.arch.in_layer(new, name), cast(tensor, dtype, name))
    write_json(folder / "config.json", merged_config(source, places, dtype))
    copy_side_files(source.path, folder)


def _without(num_layers: int, gone: Iterable[int]) -> list[int]:
    return sorted(set(range(num_layers)) - set(gone))


@contextmanager
def _all_layers(walk: LayerWalk) -> Iterator[list[nn.Module]]:
    """All layers with their weights at once, for the time of a `with` block."""
    with ExitStack() as stack:
        yield [stack.enter_context(walk.layer(index)) for index in range(walk.num_layers)]


def _states(walk: LayerWalk, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
    """Every state in turn, shape (samples, length, hidden_size): one buffer, overwritten by the next."""
    states = walk.embed(tokens)
    yield states
    for index in range(walk.num_layers):
        with walk.layer(index) as layer:
            walk.run_all(layer, index, states)
        yield states


def _last_tokens(walk: LayerWalk, tokens: torch.Tensor) -> torch.Tensor:
    """All states at the last token of each sequence, shape (layers + 1, samples, hidden_size), float64."""
    return torch.stack([states[:, -1].double() for states in _states(walk, tokens)])


def _closest_block(
    states: torch.Tensor,
    size: int,
    starts: Iterable[int],
    distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> range:
    """The block of `size` layers with the smallest mean distance between its input and its output.

    Args:
        states: Shape (layers + 1, samples, hidden_size).
        size: Layers in the block.
        starts: Where it may begin.
        distance: Of two states, shape (samples, hidden_size) each, to shape (samples,).
    """
    start = min(starts, key=lambda at: distance(states[at], states[at + size]).mean().item())
    return range(start, start + size)


@torch.no_grad()
def _loss(head: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor, states: torch.Tensor) -> float:
    """Mean negative log-likelihood of tokens, from the output of the last layer."""
    losses = []
    for row, state in zip(tokens, states, strict=True):
        logits = head(state[None])[0, :-1].float()
        losses.append(nn.functional.cross_entropy(logits, row[1:].long().to(logits.device)).item())
    return math.fsum(losses) / len(losses)


def _output(
    walk: LayerWalk, layers: Sequence[nn.Module], groups: Sequence[Weights], inputs: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The last layer's output of a model in which groups of layers are merged.

    Args:
        walk: The original model.
        layers: Its layers, with their weights.
        groups: The new layers.
        inputs: What each old layer gets in the original model, shape (samples, length, hidden_size).
    """
    start = next((at for at, weights in enumerate(groups) if len(weights) > 1), len(groups))
    states = inputs[sum(len(weights) for weights in groups[:start])].clone()
    for weights in groups[start:]:
        place = min(weights)
        layer = layers[place]
        if len(weights) > 1:
            layer = copy.deepcopy(layer)
            layer.load_state_dict(laco_layer({old: layers[old].state_dict() for old in weights}, weights))
        walk.run_all(layer, place, states)
    return states


def _collapse(
    similarity: Callable[[Sequence[Weights]], float],
    count: int,
    removed: int,
    threshold: float,
    *,
    together: int,
    interval: int,
    lowest: int,
) -> tuple[list[Weights], float]:
    """One pass of LaCo's algorithm 1: the new layers, and the largest similarity that was rejected."""
    groups = [{index: 1.0} for index in range(count)]
    at, rejected = count - together, -math.inf
    while at >= lowest and (left := len(groups) - (count - removed)) > 0:
        end = at + 1 + min(together - 1, left)
        trial = [*groups[:at], laco_weights(groups[at:end]), *groups[end:]]
        if (score := similarity(trial)) >= threshold:
            groups = trial
            at = min(at - interval, len(groups) - together)
        else:
            rejected = max(rejected, score)
            at -= 1
    return groups, rejected


def _linear_map(walk: LayerWalk, tokens: torch.Tensor, block: range) -> torch.Tensor:
    """ReplaceMe's T for a block, by the normal equations, shape (hidden_size, hidden_size), float64."""
    states, outputs = walk.embed(tokens), list[torch.Tensor]()
    for index in range(block.stop):
        with walk.layer(index) as layer:
            if index != block.start - 1:
                walk.run_all(layer, index, states)
                continue
            hook = layer.get_submodule("mlp").register_forward_hook(lambda *call: outputs.append(call[2]))
            walk.run_all(layer, index, states)
            hook.remove()
        mlp = torch.cat(outputs)
        rest = states - mlp
    gram, cross = torch.zeros(2, mlp.shape[-1], mlp.shape[-1], dtype=torch.float64, device=mlp.device)
    for inputs, targets in zip(batches(mlp), batches(states - rest), strict=True):
        flat = inputs.flatten(0, 1).double()
        gram += flat.T @ flat
        cross += flat.T @ targets.flatten(0, 1).double()
    transform: torch.Tensor = torch.linalg.pinv(gram, hermitian=True) @ cross
    return transform
