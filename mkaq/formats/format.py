"""The interface of a weight format: one module per format, selected by `quant_method`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from mkaq.arch.arch import Arch
from mkaq.dtypes import FLOATS
from mkaq.errors import UnsupportedError

Config = Mapping[str, Any]
"""The `quantization_config` of a checkpoint; empty for a dense one."""


NO_GGUF = "it reads GGUF, which export.formats can add"
ONLY_DENSE = "only artifacts that are not quantized were tried there"


class TensorSchema(NamedTuple):
    """What a stored tensor must be.

    Attributes:
        shape: Its shape; None for any.
        dtypes: Its possible dtypes, by their names in safetensors.
    """

    shape: tuple[int, ...] | None
    dtypes: tuple[str, ...] = tuple(FLOATS)


class Format(Protocol):
    """How a checkpoint stores its linear layers.

    The tensors of a layer are named relative to its module: `weight`, `qweight`, `bias`, ...
    """

    NEEDS: str
    """How to install what loading needs beside transformers; empty if nothing."""
    REFUSALS: Mapping[str, Callable[[Config], str]]
    """For each known runtime, why it does not run such a checkpoint; empty if it does."""

    def check_config(self, config: Config, arch: Arch, where: object) -> None:
        """Refuses what mkaq cannot read, or would read wrongly.

        Args:
            config: The quantization_config.
            arch: The names of the model's modules.
            where: The file to name in errors.

        Raises:
            UnsupportedError: If it is a variant that mkaq does not read.
            CheckpointError: If it contradicts itself.
        """

    def quantizes_head(self, config: Config, head: str) -> bool:
        """Whether the output layer, which is called `head`, is quantized too."""

    def bits(self, config: Config) -> int | None:
        """Bits per code; None if there are no codes."""

    def schema(self, shape: tuple[int, int], config: Config) -> dict[str, TensorSchema]:
        """The tensors that store a weight of shape (out_features, in_features)."""

    def stored_bytes(self, shape: tuple[int, int], config: Config) -> int:
        """The bytes of these tensors."""

    def read(self, tensors: dict[str, torch.Tensor], config: Config) -> dict[str, torch.Tensor]:
        """The part of `restore` that needs no device, so that it can be done in advance.

        Raises:
            ValueError: If the tensors do not match one another (libraries may raise other errors).
        """

    def restore(
        self,
        tensors: dict[str, torch.Tensor],
        like: nn.Linear,
        config: Config,
        device: torch.device,
        dtype: torch.dtype,
    ) -> nn.Module:
        """The module that computes as a serving runtime does.

        Args:
            tensors: The result of `read`.
            like: The dense layer to replace, on the meta device.
            config: The quantization_config.
            device: Where the module runs.
            dtype: The dtype it computes in.

        Raises:
            ValueError: As `read`.
        """

    def dequantize(self, tensors: dict[str, torch.Tensor], config: Config) -> torch.Tensor:
        """The weight that stored tensors represent, shape (out_features, in_features)."""


def unsupported(what: str, where: object) -> UnsupportedError:
    """The error for a variant that mkaq does not read."""
    return UnsupportedError(
        f"quantization_config has {what}, which mkaq does not read",
        where=where,
        fix="load it with the library that wrote it, or start from the original weights",
    )


def type_name(value: object) -> str:
    """The name of a dtype in a configuration, without `torch.`."""
    return str(value).removeprefix("torch.")
