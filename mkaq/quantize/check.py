"""What the GPTQ format can hold, checked before any work."""

from mkaq.errors import UnsupportedError
from mkaq.model.checkpoint import Checkpoint
from mkaq.recipe import GptqSection


def check_gptq(source: Checkpoint, section: GptqSection) -> None:
    """Checks, before any work, that every linear layer fits the format.

    Raises:
        UnsupportedError: If a size is not a multiple of 32, or `group_size` does not divide it.
    """
    for name in source.family.linear_names:
        out_features, in_features = source.tensors[f"model.layers.0.{name}.weight"].shape
        if in_features % 32 or out_features % 32:
            raise UnsupportedError(
                f"{name} is {out_features} x {in_features}; the GPTQ format needs multiples of 32",
                where=source.path,
            )
        if section.group_size != -1 and in_features % section.group_size:
            sizes = [size for size in (16, 32, 64, 128) if in_features % size == 0]
            raise UnsupportedError(
                f"group_size {section.group_size} does not divide the {in_features} inputs of {name}",
                where="quantize.group_size",
                fix=f"use {', '.join(map(str, sizes))} or -1",
            )
