"""Paths as users write them."""

from pathlib import Path

from mkaq.errors import UsageError


def user_path(text: str) -> Path:
    """A path with `~` expanded.

    Raises:
        UsageError: If there is no such user.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UsageError("no such user", where=text) from None
