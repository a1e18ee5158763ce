"""Arguments and options shared by several commands, and their parsing."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from mkaq.errors import UsageError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from mkaq.recipe import Recipe

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")
]
Setting = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a key, e.g. merge.ratio=0.25.")
]
Output = Annotated[
    Path | None, typer.Option("--output", metavar="DIR", help="Folder of the run [runs/NAME].")
]
Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")]
MaxMemory = Annotated[
    str | None,
    typer.Option("--max-memory", metavar="SIZE", help="Use no more memory than this, such as 6GB."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a hub id, or builtin:tiny-llama.")]
Artifact = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="The artifact's folder.")]

_Section = TypeVar("_Section", bound="BaseModel")
_Value = TypeVar("_Value")


def load(recipe: str, settings: list[str], output: Path | None) -> "tuple[Recipe, Path]":
    """The recipe with its settings applied, and the folder of its run.

    Raises:
        UsageError: If there is no such recipe, it or a setting is invalid, or the folder's name is not UTF-8.
        UnsupportedError: If the only faults are options that this version does not have.
    """
    from mkaq.paths import utf8_path
    from mkaq.recipe_file import load_recipe
    from mkaq.shipped import find_recipe

    loaded = load_recipe(find_recipe(recipe), settings)
    return loaded, utf8_path(output or Path("runs") / loaded.name)


def bytes(size: str | None, option: str = "--max-memory") -> int | None:
    """The bytes that an option names, or None.

    Raises:
        UsageError: If it is not a size.
    """
    from mkaq.units import parse_size

    return _parsed(size, parse_size, option)


def seconds(age: str | None, option: str) -> float | None:
    """The seconds that an option names, or None.

    Raises:
        UsageError: If it is not a time.
    """
    from mkaq.units import parse_age

    return _parsed(age, parse_age, option)


def _parsed(text: str | None, parse: Callable[[str], _Value], option: str) -> _Value | None:
    try:
        return None if text is None else parse(text)
    except ValueError as error:
        raise UsageError(str(error), where=option) from None


def section(kind: type[_Section], values: dict[str, Any]) -> _Section:
    """A recipe section made from command-line options of the same names.

    Raises:
        UsageError: If the section rejects the value of an option.
    """
    from pydantic import ValidationError

    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = f"--{str(first['loc'][0]).replace('_', '-')}" if first["loc"] else "--dataset"
        raise UsageError(str(first["msg"]).removeprefix("Value error, "), where=option) from None


def quiet_libraries() -> None:
    """Disables the libraries' logging and telemetry. Call it before they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)
