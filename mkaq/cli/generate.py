"""Commands that write text: continue a prompt, and talk."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from mkaq.cli import options
from mkaq.cli.options import AsJson, Device
from mkaq.console import print_json, printable, say
from mkaq.errors import UsageError

if TYPE_CHECKING:
    from mkaq.generate.writer import Reply

_Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, a GGUF file, a hub id, or builtin:tiny-llama.")
]
_MaxNewTokens = Annotated[int, typer.Option(min=1, help="At most this many tokens.")]
_Temperature = Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")]
_TopK = Annotated[int, typer.Option(min=0, help="Only so many likeliest tokens; 0: all.")]
_TopP = Annotated[float, typer.Option(min=0.0001, max=1, help="Only the likeliest with this probability.")]
_MinP = Annotated[float, typer.Option(min=0, max=1, help="Only tokens this likely beside the likeliest.")]
_Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the draws.")]


def generate(
    artifact: _Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue.")],
    max_new_tokens: _MaxNewTokens = 64,
    temperature: _Temperature = 0.0,
    top_k: _TopK = 0,
    top_p: _TopP = 1.0,
    min_p: _MinP = 0.0,
    seed: _Seed = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Continue a text. Tokens appear as they come; speed and memory are told at the end."""
    if temperature == 0 and (top_k, top_p, min_p) != (0, 1.0, 0.0):
        raise UsageError("only a --temperature above 0 draws from several tokens", where="generate")
    options.quiet_libraries()
    from mkaq.generate.sampling import Sampling
    from mkaq.generate.writer import writer_of

    writer = writer_of(artifact, device, Sampling(temperature, top_k, top_p, min_p, seed))
    unseen = iter([_utf8(prompt)])  # shown with the first piece: until then it may fail

    def show(piece: str) -> None:
        if not as_json:
            _show(next(unseen, "") + piece)

    reply = writer.complete(_utf8(prompt), max_new_tokens, show)
    if as_json:
        told = {"prompt": prompt, "text": reply.text, "context_full": reply.full}
        print_json(told | vars(reply.pace))
    else:
        show("")
        _end(reply)


def chat(
    artifact: _Model,
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
    options.quiet_libraries()
    from mkaq.generate.sampling import Sampling
    from mkaq.generate.writer import writer_of

    writer = writer_of(artifact, device, Sampling(temperature, top_k, top_p, min_p, seed))
    if not writer.talks:
        fix = "`mkaq generate` continues a text"
        raise UsageError("the model has no chat template", where=artifact, fix=fix)
    messages, failed = [{"role": "system", "content": _utf8(system)}] if system else [], False
    for line in _lines():
        try:
            asked = [*messages, {"role": "user", "content": _utf8(line, "a message")}]
            reply = writer.answer(asked, max_new_tokens, _show)
        except UsageError as error:  # the conversation goes on without this message
            say(f"mkaq: {error}", error=True)
            failed = True
            continue
        _end(reply)
        messages = [*asked, {"role": "assistant", "content": reply.text}]
    if failed:
        sys.exit(UsageError.exit_code)


def _lines() -> Iterator[str]:
    """What the user types, without empty lines, until the end of the input."""
    asked = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if asked else "")
        except EOFError:
            return
        if line.strip():
            yield line


def _utf8(text: str, where: str = "PROMPT") -> str:
    if text.encode(errors="ignore").decode() != text:
        raise UsageError("the text is not UTF-8", where=where)
    return text


def _show(text: str) -> None:
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def _end(reply: "Reply") -> None:
    """Ends the text; tells speed and memory."""
    from mkaq.peak import peak_bytes
    from mkaq.units import human

    full = ", and the context is full" * reply.full
    print()
    print(f"{reply.pace.describe()}, {human(peak_bytes())} of memory{full}", file=sys.stderr)
