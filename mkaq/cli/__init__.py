"""The command line. torch and transformers are imported inside commands, so --help is instant."""

import signal
import sys
import traceback
from typing import Annotated

import typer

from mkaq import __version__
from mkaq.cli import about, artifact, clean, generate, measure, run
from mkaq.console import escape_unencodable, say
from mkaq.errors import as_mkaq_error

__all__ = ["app", "main"]

app = typer.Typer(
    name="mkaq",
    help="Merge the similar layers of a language model, quantize the rest, ship one verified artifact.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(value: bool) -> None:
    if value:
        print(f"mkaq {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    pass


# --help lists them in this order.
app.command()(run.run)
app.command()(run.plan)
app.command()(measure.analyze)
app.command()(artifact.inspect)
app.command()(artifact.verify)
app.command(name="eval")(measure.evaluate)
app.command()(measure.bench)
app.command()(generate.generate)
app.command()(generate.chat)
app.command()(clean.clean)
app.command()(about.recipes)
app.command()(about.schema)


def main() -> None:
    """Runs a command; turns every error into one message and an exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    escape_unencodable()
    try:
        arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
        if app(arguments or ["--help"], standalone_mode=False) == 130:
            raise KeyboardInterrupt  # typer returns 130 for it
    except BrokenPipeError:
        sys.exit(0)
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        shown = as_mkaq_error(error)
        say(f"mkaq: {shown}", error=True)
        sys.exit(shown.exit_code)
    sys.exit(0)
