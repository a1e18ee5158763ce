"""What the other formats of an artifact are told beside its model."""

from typing import Literal, NamedTuple


class GgufTypes(NamedTuple):
    """The types of what is not GPTQ in a GGUF file.

    Attributes:
        embedding: Of the embedding and of a head of its own; `source`: as in the checkpoint.
        dense: Of linear layers that are not quantized.
    """

    embedding: Literal["source", "f32", "f16", "bf16", "q8_0", "q4_0"] = "source"
    dense: Literal["source", "f16", "q8_0"] = "source"


class Settings(NamedTuple):
    """Settings of all formats.

    Attributes:
        name: The artifact's name.
        base_model: The hub id of the model that it was made from; None if not known.
        shard_size: Largest number of data bytes per weight file.
        gguf: The types in a GGUF file.
    """

    name: str
    base_model: str | None = None
    shard_size: int = 1 << 32
    gguf: GgufTypes = GgufTypes()
