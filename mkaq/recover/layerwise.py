"""The recover stage: every layer of the compressed model is tuned alone toward the original hidden states.

Knowledge distillation without the whole model: each layer reads the output of the tuned layers before it, and
its target is the source's hidden state after the group of layers that it replaces. The last one is then tuned
toward the source's predictions. One layer, its optimizer state and two streams of activations are in memory.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from mkaq.checkpoint.finished import Finished
from mkaq.checkpoint.layout import layout_like
from mkaq.checkpoint.output import Output
from mkaq.checkpoint.side_files import copy_side_files
from mkaq.checkpoint.writer import writer_of
from mkaq.files import write_json
from mkaq.fit.hold_out import Samples, held_out_mean, token_weights
from mkaq.heap import return_freed_memory
from mkaq.recover.ending import tune_ending
from mkaq.recover.steps import Tuning, descend, shuffled
from mkaq.walk.batches import batch_size
from mkaq.walk.walk import LayerWalk

CHECKS = 5  # times that the held-out error of a layer is measured


@dataclass(frozen=True)
class RecoveredLayer:
    """The outcome of tuning a layer.

    Attributes:
        new: The layer's number.
        error_before: Mean of |output - original|^2 / |original|^2 over held-out tokens, before tuning.
        error: The same, with the final weights.
        steps: The step with the lowest held-out error; 0 if the weights are unchanged.
    """

    new: int
    error_before: float
    error: float
    steps: int


class Recovered(NamedTuple):
    """The results of `recover`.

    Attributes:
        layers: The outcome of every layer.
        divergence_before: KL(source || model) in nats per held-out token, before the last layer was tuned
            toward it.
        divergence: The same after.
        digests: sha256 of the weight files by name.
    """

    layers: list[RecoveredLayer]
    divergence_before: float
    divergence: float
    digests: Mapping[str, str]


def recover(
    source: LayerWalk,
    walk: LayerWalk,
    groups: Sequence[Sequence[int]],
    samples: Samples,
    tuning: Tuning,
    folder: Path,
    output: Output,
    finished: Finished | None = None,
) -> Recovered:
    """Tunes every layer and writes the checkpoint.

    Args:
        source: A walk over the source.
        walk: A walk over the compressed checkpoint.
        groups: For each layer, the source layers that it replaces.
        samples: The calibration samples.
        tuning: How layers are tuned.
        folder: Folder of the checkpoint.
        output: How it is written.
        finished: Layers tuned before this was stopped; gets those that are tuned.
    """
    dtype, progress = output.dtype, output.progress
    finished = finished or Finished(None, walk.ranks)
    compressed = walk.checkpoint
    arch = compressed.arch
    if walk.device.type == "cpu":
        walk.use_eager_attention()
        source.use_eager_attention()
    original, states = source.embed(samples.tokens), walk.embed(samples.tokens)
    records: list[RecoveredLayer] = []
    layout = layout_like(compressed, range(compressed.num_layers), dtype)
    with writer_of(walk.ranks, folder, output.shard_size, layout) as writer:
        for name, tensor in compressed.each(compressed.outer_tensor_names):
            writer.add(name, tensor.to(dtype))
        for new, group in enumerate(progress.track(groups, "recover (layerwise)")):
            for index in group:
                source.pass_layer(index, original)
            with walk.layer(new) as layer:
                if found := finished.find(new):
                    record = _placed(layer, *found, walk)
                else:
                    record = tune(walk, layer, new, states, original, samples, tuning, dtype)
                    finished.keep(new, _saved(layer, dtype), asdict(record))
                if new == len(groups) - 1:
                    ending = tune_ending(source, walk, layer, states, original, samples, tuning, dtype)
                    error = layer_error(walk, layer, new, states, original, samples)
                    record = replace(record, error=error, steps=record.steps + ending.step)
                records.append(record)
                walk.run_all(layer, new, states)
                progress.say(_line(records[-1]))
                for name, tensor in _saved(layer, dtype).items():
                    writer.add(arch.in_layer(new, name), tensor)
            return_freed_memory()
    progress.say(f"  last layer: held-out divergence {ending.before:.4f} -> {ending.error:.4f}")
    write_json(folder / "config.json", compressed.config)
    copy_side_files(compressed.path, folder)
    return Recovered(records, ending.before, ending.error, writer.digests)


def _saved(layer: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A layer's weights as they are saved, by name."""
    return {name: parameter.detach().to("cpu", dtype) for name, parameter in layer.named_parameters()}


def _placed(
    layer: nn.Module, tensors: Mapping[str, torch.Tensor], record: Any, walk: LayerWalk
) -> RecoveredLayer:
    """Puts weights that were tuned before into a layer; their record."""
    weights = {name: tensor.to(walk.device, walk.dtype) for name, tensor in tensors.items()}
    layer.load_state_dict(weights, strict=False, assign=True)
    layer.requires_grad_(False)
    return RecoveredLayer(**record)


def tune(
    walk: LayerWalk,
    layer: nn.Module,
    new: int,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    samples: Samples,
    tuning: Tuning,
    dtype: torch.dtype,
) -> RecoveredLayer:
    """Tunes a layer in place; leaves the weights of the lowest held-out error, rounded to `dtype`.

    The loss is |output - target|^2 / |target|^2, averaged over tokens: the following norms see the same
    relative error. Products are in bfloat16, the rest is that of `descend`. A step's batch goes through the
    layer in parts of `TOKENS_PER_BATCH` tokens, whose gradients are added.

    Args:
        walk: The walk that the layer belongs to.
        layer: The layer, with its weights on the device.
        new: The layer's number.
        inputs: The output of the layers before it, shape (samples, length, hidden_size).
        targets: The target hidden states, of the same shape.
        samples: Their samples.
        tuning: How layers are tuned.
        dtype: Type of the saved weights.
    """
    orders = shuffled(samples.num_train, math.ceil(tuning.batch_size / walk.ranks.size), tuning.seed)

    def backward(chosen: torch.Tensor) -> None:
        for part in torch.split(chosen, batch_size(inputs)) if len(chosen) else ():
            with walk.autocast():
                output = walk.run(layer, new, inputs[part])
            target = walk.to_device(targets[part]).float()
            loss = ((output.float() - target).square().mean(-1) * token_weights(target)).mean()
            (loss * (len(part) / len(chosen))).backward()  # type: ignore[no-untyped-call]

    def error_of(other: nn.Module) -> float:
        return layer_error(walk, other, new, inputs, targets, samples)

    rate = tuning.rate(inputs.shape[-1])
    done = descend(
        walk, layer, dtype, orders, backward, error_of, steps=tuning.steps, learning_rate=rate, checks=CHECKS
    )
    return RecoveredLayer(new, *done)


@torch.no_grad()
def layer_error(
    walk: LayerWalk,
    layer: nn.Module,
    new: int,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    samples: Samples,
) -> float:
    """The mean of |output - target|^2 / |target|^2 over the held-out tokens of all processes."""
    return held_out_mean(
        walk, samples, lambda rows: (walk.run(layer, new, inputs[rows]), walk.to_device(targets[rows]))
    )


def _line(record: RecoveredLayer) -> str:
    outcome = f"step {record.steps}" if record.steps else "kept as it was"
    return f"  layer {record.new}: held-out error {record.error_before:.4f} -> {record.error:.4f} ({outcome})"
