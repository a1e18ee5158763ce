"""The shipped recipes: in an installed package, or beside it in a checkout."""

import difflib
import itertools
from pathlib import Path

from mkaq.errors import UsageError

LISTED = "`mkaq recipes` lists those that ship"
_FOLDERS = (Path(__file__).parent / "recipes", Path(__file__).parent.parent / "recipes")


def shipped_recipes() -> list[tuple[Path, str]]:
    """The file of every shipped recipe, and the first paragraph of its comment."""
    folder = next(path for path in _FOLDERS if path.is_dir())
    return [(file, _about(file.read_text(encoding="utf-8"))) for file in sorted(folder.glob("*.yaml"))]


def _about(text: str) -> str:
    lines = (line.lstrip("# ") for line in text.splitlines())
    return " ".join(itertools.takewhile(bool, lines))


def find_recipe(name: str) -> Path:
    """The file of a recipe, given its path or the name of a shipped one (with or without `recipes/` and
    `.yaml`).

    Raises:
        UsageError: If there is neither.
    """
    path = Path(name)
    if path.exists():
        return path
    files = {file.stem: file for file, _ in shipped_recipes()}
    for stem, file in files.items():
        if name in (stem, file.name, f"recipes/{file.name}"):
            return file
    near = difflib.get_close_matches(path.stem, files, n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    raise UsageError("no such recipe", where=name, fix=meant + LISTED)
