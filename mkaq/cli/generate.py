"""Commands that write text: continue a prompt, and talk."""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from mkaq.cli import options
from mkaq.cli.options import AsJson, Device, Model
from mkaq.console import print_json
from mkaq.errors import UsageError

if TYPE_CHECKING:
    import torch

    from mkaq.generate.sampling import Sampling
    from mkaq.generate.stream import Pace

_MaxNewTokens = Annotated[int, typer.Option(min=1, help="At most this many tokens.")]
_Temperature = Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")]
_TopK = Annotated[int, typer.Option(min=0, help="Only so many likeliest tokens; 0: all.")]
_TopP = Annotated[float, typer.Option(min=0.0001, max=1, help="Only the likeliest with this probability.")]
_MinP = Annotated[float, typer.Option(min=0, max=1, help="Only tokens this likely beside the likeliest.")]
_Seed = Annotated[int, typer.Option(min=0, help="Seed of the draws.")]


def generate(
    artifact: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: _MaxNewTokens = 64,
    temperature: _Temperature = 0.0,
    top_k: _TopK = 0,
    top_p: _TopP = 1.0,
    min_p: _MinP = 0.0,
    seed: _Seed = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Continue a text. Tokens appear as they come; the speed is told at the end."""
    from mkaq.generate.sampling import Sampling

    speaker = _speaker(artifact, device, Sampling(temperature, top_k, top_p, min_p, seed))
    ids = speaker.tokenizer(_utf8(prompt))["input_ids"]
    if not ids:
        raise UsageError("the prompt has no tokens", where="PROMPT")
    if not as_json:
        print(prompt, end="", flush=True)
    new, pace = speaker.say(ids, max_new_tokens, show=not as_json)
    if as_json:
        print_json({"prompt": prompt, "text": speaker.tokenizer.decode(new), "tokens": len(new)})
    else:
        print(pace.describe(), file=sys.stderr)


def chat(
    artifact: Model,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is told first.")] = None,
    max_new_tokens: _MaxNewTokens = 512,
    temperature: _Temperature = 0.7,
    top_k: _TopK = 0,
    top_p: _TopP = 0.95,
    min_p: _MinP = 0.0,
    seed: _Seed = 0,
    device: Device = "auto",
) -> None:
    """Talk with a model, in its own chat template. A line is a message; end with Ctrl-D."""
    from mkaq.generate.sampling import Sampling

    speaker = _speaker(artifact, device, Sampling(temperature, top_k, top_p, min_p, seed))
    if not speaker.tokenizer.chat_template:
        fix = "`mkaq generate` continues a text"
        raise UsageError("the model has no chat template", where=artifact, fix=fix)
    messages = [{"role": "system", "content": _utf8(system)}] if system else []
    for line in _lines():
        messages.append({"role": "user", "content": line})
        new, pace = speaker.say(speaker.prompt(messages, artifact), max_new_tokens, show=True)
        print(pace.describe(), file=sys.stderr)
        messages.append({"role": "assistant", "content": speaker.tokenizer.decode(new)})


def _lines() -> Iterator[str]:
    """What the user types, without empty lines, until the end of the input."""
    asked = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if asked else "")
        except EOFError:
            return
        if line.strip():
            yield _utf8(line)


def _utf8(text: str) -> str:
    if text.encode(errors="ignore").decode() != text:
        raise UsageError("the prompt is not UTF-8", where="PROMPT")
    return text


class _Speaker(NamedTuple):
    """A model with its tokenizer, ready to write."""

    model: Any
    tokenizer: Any
    stop: set[int]
    device: "torch.device"
    choose: "Callable[[torch.Tensor], int]"

    def prompt(self, messages: Sequence[dict[str, str]], where: str) -> list[int]:
        """The tokens of a conversation, up to where the model answers."""
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program of the model's author
            raise UsageError(f"its chat template fails: {str(error)[:200]}", where=where) from None
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def say(self, ids: list[int], limit: int, *, show: bool) -> "tuple[list[int], Pace]":
        """The new tokens, printed as they come."""
        import torch
        from transformers import TextStreamer

        from mkaq.generate.stream import Pace, stream

        pace, printer, new = Pace(), TextStreamer(self.tokenizer), list[int]()
        inputs = torch.tensor([ids], device=self.device)
        for token in stream(self.model, inputs, limit, self.stop, self.choose, pace):
            new.append(token)
            if show:
                printer.put(torch.tensor([token]))
        if show:
            printer.end()
        return new, pace


def _speaker(model: str, device: str, sampling: "Sampling") -> _Speaker:
    options.quiet_libraries()
    from mkaq.calibrate.tokenizer import load_tokenizer
    from mkaq.checkpoint.end_tokens import end_tokens
    from mkaq.checkpoint.resolve import resolve_model
    from mkaq.checkpoint.validate import open_checkpoint
    from mkaq.generate.sampling import chooser
    from mkaq.walk.device import compute_dtype, pick_device
    from mkaq.walk.whole_model import whole_model

    checkpoint, torch_device = open_checkpoint(resolve_model(model), quantized=True), pick_device(device)
    tokenizer = load_tokenizer(checkpoint.path)
    whole = whole_model(checkpoint, torch_device, compute_dtype(checkpoint.dtype, torch_device))
    return _Speaker(whole, tokenizer, end_tokens(checkpoint.path, tokenizer), torch_device, chooser(sampling))
