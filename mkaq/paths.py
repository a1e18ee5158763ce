"""Paths as users write them."""

from pathlib import Path

from mkaq.errors import UsageError


def utf8_path(path: Path) -> Path:
    """Returns the path unchanged if safetensors can open files below it.

    Raises:
        UsageError: If it is not UTF-8, which safetensors requires.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UsageError("its name is not UTF-8", where=path, fix="give the folder another name") from None
    return path


def user_path(text: str) -> Path:
    """A path with `~` expanded.

    Raises:
        UsageError: If there is no such user.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UsageError("no such user", where=text) from None
