"""The command that frees a run's disk."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mkaq.cli import options
from mkaq.cli.options import AsJson
from mkaq.console import print_json, print_table, say
from mkaq.errors import UsageError

if TYPE_CHECKING:
    from mkaq.run.clean import Findings, Item


def clean(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A run's folder, such as runs/NAME.")],
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it, only show what would go.")] = False,
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="Keep stages younger than this: 30m, 12h, 7d, 2w.")
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Delete stages, the oldest first, until the store has this size."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Delete stages that a run's last recipe does not use, and what killed runs have left."""
    from mkaq.pipeline import NAMES
    from mkaq.run.clean import choose, look
    from mkaq.run.inventory import bytes_of
    from mkaq.run.lock import held, is_run
    from mkaq.run.store import STORE

    age, size = options.seconds(older_than, "--older-than"), options.bytes(keep, "--keep")
    if not is_run(folder):
        raise UsageError("is no run's folder", where=folder, fix="give one, such as runs/NAME")
    with held(folder, NAMES, otherwise="clean another folder"):
        found = look(folder, NAMES)
        chosen = choose(found, time.time(), age or 0, size)
        failed: list[tuple[Path, str]] = []
        if yes:
            chosen, failed = _delete(chosen)
        store_bytes = bytes_of(folder / STORE) if yes else found.store_bytes
    found.left.extend(failed)
    if as_json:
        _print_as_json(folder, found, chosen, store_bytes, deleted=yes)
    else:
        _print(folder, found, chosen, store_bytes, deleted=yes)
    if failed:
        path, why = failed[0]
        raise UsageError(why, where=path, fix="check its permissions, and clean again")


def _delete(chosen: "list[Item]") -> "tuple[list[Item], list[tuple[Path, str]]]":
    """Deletes items; returns those that were there, and those that cannot be deleted, with the reason."""
    from mkaq.run.clean import delete

    deleted, failed = [], []
    for item in chosen:
        try:
            deleted += [item] * delete(item)
        except OSError as error:
            failed.append((item.path, f"it cannot be deleted ({error.strerror})"))
    return deleted, failed


def _print(folder: Path, found: "Findings", chosen: "list[Item]", store_bytes: int, *, deleted: bool) -> None:
    from mkaq.progress import clock
    from mkaq.units import human

    for path, why in found.left:
        say(f"note: {path} stays: {why}", error=True)
    if chosen:
        rows = [(str(item.path.relative_to(folder)), human(item.bytes), clock(item.made)) for item in chosen]
        kinds = ["unused" if item.unused else "leftover" for item in chosen]
        print_table(
            ("deleted" if deleted else "to delete", "bytes", "made", "what"),
            [(*row, kind) for row, kind in zip(rows, kinds, strict=True)],
        )
    freed = human(sum(item.bytes for item in chosen))
    if deleted:
        say(f"deleted {freed}; the store has {human(store_bytes)}")
    elif chosen:
        say(f"would delete {freed}; the store has {human(store_bytes)}; --yes deletes")
    else:
        say(f"nothing to delete; the store has {human(store_bytes)}")


def _print_as_json(
    folder: Path, found: "Findings", chosen: "list[Item]", store_bytes: int, *, deleted: bool
) -> None:
    print_json(
        {
            "run": str(folder),
            "deleted": deleted,
            "items": [vars(item) | {"path": str(item.path)} for item in chosen],
            "bytes": sum(item.bytes for item in chosen),
            "store_bytes": store_bytes,
            "left": [{"path": str(path), "why": why} for path, why in found.left],
        }
    )
