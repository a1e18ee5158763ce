"""Dense linear layers: a weight, and possibly a bias."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from mkaq.arch.arch import Arch
from mkaq.formats.format import NO_GGUF, Config, TensorSchema

_RUN = ("transformers on a CPU", "vLLM", "vLLM on a CPU", "ONNX Runtime GenAI", "MLX", "OpenVINO")
NEEDS = ""
REFUSALS: Mapping[str, Callable[[Config], str]] = {
    **{name: lambda config: "" for name in _RUN},
    "llama.cpp": lambda config: NO_GGUF,
}


def check_config(config: Config, arch: Arch, where: object) -> None:
    """Accepts everything: a dense checkpoint has no quantization_config."""


def quantizes_head(config: Config, head: str) -> bool:
    """Never."""
    return False


def bits(config: Config) -> int | None:
    """None: there are no codes."""
    return None


def schema(shape: tuple[int, int], config: Config) -> dict[str, TensorSchema]:
    """The weight."""
    return {"weight": TensorSchema(shape)}


def stored_bytes(shape: tuple[int, int], config: Config) -> int:
    """Bytes of the weight in bfloat16."""
    return 2 * shape[0] * shape[1]


def read(tensors: dict[str, torch.Tensor], config: Config) -> dict[str, torch.Tensor]:
    """The tensors, unchanged."""
    return tensors


def restore(
    tensors: dict[str, torch.Tensor],
    like: nn.Linear,
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    """The dense layer itself, with its weights."""
    placed = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    like.load_state_dict(placed, assign=True)
    return like


def dequantize(tensors: dict[str, torch.Tensor], config: Config) -> torch.Tensor:
    """The weight, in its own dtype."""
    return tensors["weight"]
