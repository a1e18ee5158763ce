"""GPTQ of a whole checkpoint: the solver inside the walk, layer by layer, true sequential."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mkaq.checkpoint.finished import Finished
from mkaq.checkpoint.output import Output, with_dtype
from mkaq.checkpoint.output import cast as converted
from mkaq.checkpoint.side_files import copy_side_files
from mkaq.checkpoint.writer import writer_of
from mkaq.files import write_json
from mkaq.fit.final_norm import Rescaled, rescaled
from mkaq.quantize.gptq_layer import place, solve_layer
from mkaq.quantize.head import quantize_head
from mkaq.quantize.joint import JointTarget
from mkaq.quantize.solved import GptqModule
from mkaq.walk.walk import LayerWalk


@dataclass(frozen=True)
class Quantized:
    """The record of a quantized checkpoint.

    Attributes:
        modules: Every quantized layer.
        final_norm: How the final norm was rescaled; None if it was not.
        digests: sha256 of the weight files by name.
    """

    modules: list[GptqModule]
    final_norm: Rescaled | None
    digests: Mapping[str, str]


def quantize_gptq(
    walk: LayerWalk,
    tokens: torch.Tensor,
    options: Mapping[str, Any],
    config: Mapping[str, Any],
    folder: Path,
    output: Output,
    target: JointTarget | None = None,
    finished: Finished | None = None,
) -> Quantized:
    """Writes the quantized checkpoint and returns its record.

    Args:
        walk: The walk over the checkpoint to quantize.
        tokens: This process's calibration token ids, shape (samples, length).
        options: Options of `gptq`: bits, group_size, sym, desc_act, static_groups, damp_percent.
        config: The quantization_config of the quantized checkpoint.
        folder: Where the checkpoint goes.
        output: How it is written.
        target: The original model, toward which weights are solved before they are rounded.
        finished: Layers quantized before this was stopped; gets those that are quantized.

    Raises:
        UsageError: If a Hessian cannot be factorized with any damping.
        UnsupportedError: If other weights overflow the dtype in which they are written.
        CheckpointError: If inputs or results of a linear layer are not finite.
    """
    source, dtype = walk.checkpoint, output.dtype
    finished = finished or Finished(None, walk.ranks)
    modules: list[GptqModule] = []
    hidden_states = walk.embed(tokens)
    arch, norm = source.arch, source.arch.final_norm_weight
    with writer_of(walk.ranks, folder, output.shard_size) as writer:
        later = {norm, arch.head_weight} if config["lm_head"] else {norm}
        for name, tensor in source.each(n for n in source.outer_tensor_names if n not in later):
            writer.add(name, converted(tensor, dtype, name))
        for index in output.progress.track(range(walk.num_layers), "quantize (gptq)"):
            prefix = f"{arch.layer_name(index)}."
            linears = {f"{prefix}{name}.weight" for name in arch.linear_names}
            for name, tensor in source.each(n for n in source.layer_tensor_names(index) if n not in linears):
                writer.add(name, converted(tensor, dtype, name))
            if target is not None:
                target.enter(index, hidden_states)
            with walk.layer(index) as layer:
                if found := finished.find(index):
                    packed, records = found[0], [GptqModule(**record) for record in found[1]]
                    place(layer, packed, config)
                    walk.run_all(layer, index, hidden_states)
                else:
                    packed, records = solve_layer(walk, layer, index, hidden_states, options, target)
                    finished.keep(index, packed, [asdict(record) for record in records])
            modules += records
            for name, tensor in packed.items():
                writer.add(f"{prefix}{name}", tensor)
        final_norm = target.rescale(walk, hidden_states) if target else None
        writer.add(norm, converted(rescaled(source, final_norm, dtype), dtype, norm))
        if config["lm_head"]:
            packed, record = quantize_head(walk, hidden_states, options)
            modules.append(record)
            for part, tensor in packed.items():
                writer.add(f"{arch.head}.{part}", tensor)
    write_json(folder / "config.json", {**with_dtype(source.config, dtype), "quantization_config": config})
    write_json(folder / "quantize_config.json", config)
    copy_side_files(source.path, folder)
    return Quantized(modules, final_norm, writer.digests)
