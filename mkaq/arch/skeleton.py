"""A transformers model without its weights, and the tensors that it implies."""

from typing import Any

from mkaq.arch.arch import Arch


def build_skeleton(hf_config: Any) -> Any:
    """A transformers model without weights: parameters on the meta device, buffers real.

    Rotary tables and Gemma's embedding scale are buffers, which no checkpoint stores.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with init_empty_weights(include_buffers=False), no_init_weights(), torch.no_grad():
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    model.tie_weights()
    return model.eval()


def dense_tensors(hf_config: Any, arch: Arch) -> dict[str, tuple[int, ...]]:
    """The name on disk and shape of every tensor of a dense checkpoint, without a tied head."""
    model = build_skeleton(hf_config)
    shapes = {arch.on_disk(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if hf_config.tie_word_embeddings:
        shapes.pop(arch.head_weight, None)
    return shapes
