"""What a weight format has to say of itself: one module each, found by `quant_method`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from mkaq.arch.arch import Arch
from mkaq.dtypes import FLOATS
from mkaq.errors import UnsupportedError

Config = Mapping[str, Any]
"""The `quantization_config` of a checkpoint, or nothing for a dense one."""


NO_GGUF = "it reads GGUF, which mkaq does not write yet"
ONLY_DENSE = "only artifacts that are not quantized were tried there"


class TensorSchema(NamedTuple):
    """What a stored tensor must be.

    Attributes:
        shape: None: any.
        dtypes: Types that it may have, as safetensors names them.
    """

    shape: tuple[int, ...] | None
    dtypes: tuple[str, ...] = tuple(FLOATS)


class Format(Protocol):
    """How the linear layers of a checkpoint are stored.

    The tensors of one layer come by their names below its module: `weight`, `qweight`, `bias`, ...
    """

    NEEDS: str
    """What has to be installed beside transformers to load it; empty: nothing."""
    REFUSALS: Mapping[str, Callable[[Config], str]]
    """By runtime, of those that are known: why it does not run such a checkpoint; empty if it does."""

    def check_config(self, config: Config, arch: Arch, where: object) -> None:
        """Refuses what mkaq does not read, or would read wrongly.

        Args:
            config: The quantization_config.
            arch: The names of the model's modules.
            where: Named in errors.

        Raises:
            UnsupportedError: If it is a variant that mkaq does not read.
            CheckpointError: If it contradicts itself.
        """

    def bits(self, config: Config) -> int | None:
        """Bits of a code; None if there are no codes."""

    def schema(self, shape: tuple[int, int], config: Config) -> dict[str, TensorSchema]:
        """The tensors that stand for a weight of shape (out_features, in_features)."""

    def stored_bytes(self, shape: tuple[int, int], config: Config) -> int:
        """Bytes of these tensors."""

    def read(self, tensors: dict[str, torch.Tensor], config: Config) -> dict[str, torch.Tensor]:
        """What can be done of `restore` without the device, ahead of its time.

        Raises:
            ValueError: If the tensors do not fit together (other errors of libraries are possible too).
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
            tensors: What `read` returned.
            like: The dense layer in whose place it goes, on the meta device.
            config: The quantization_config.
            device: Where it will run.
            dtype: In which it computes.

        Raises:
            ValueError: As `read`.
        """

    def dequantize(self, tensors: dict[str, torch.Tensor], config: Config) -> torch.Tensor:
        """The weight that stored tensors stand for, shape (out_features, in_features)."""


def unsupported(what: str, where: object) -> UnsupportedError:
    """The error for a variant of a format."""
    return UnsupportedError(
        f"quantization_config has {what}, which mkaq does not read",
        where=where,
        fix="load it with the library that wrote it, or start from the original weights",
    )


def type_name(value: object) -> str:
    """A type as a configuration names it, without `torch.`."""
    return str(value).removeprefix("torch.")
