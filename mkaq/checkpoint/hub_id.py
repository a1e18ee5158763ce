"""The hub repository of a local model, for the model card: an id such as `org/name`, never a path."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"


def is_hub_id(text: object) -> bool:
    """Whether `text` is the id of a repository with its owner, in the form that hubs accept."""
    return (
        isinstance(text, str)
        and re.fullmatch(f"{_PART}/{_PART}", text) is not None
        and len(text) <= 96
        and not any(bad in text for bad in ("--", "..", ".git"))
    )


def hub_id_of(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The id of the repository that a folder is a copy of, if the folder says so.

    A snapshot in the hub's cache lies in `models--ORG--NAME`. Elsewhere `_name_or_path` of config.json can
    name the repository. In a fine-tuned model it names the model that training started from, so it counts
    only if the folder has the same name.

    Args:
        folder: The model's folder.
        config: Its config.json.
    """
    folder = folder.resolve()
    if folder.parent.name == "snapshots":
        kind, *parts = folder.parent.parent.name.split("--")
        hub_id = "/".join(parts)
        return hub_id if kind == "models" and is_hub_id(hub_id) else None
    named = config.get("_name_or_path")
    if is_hub_id(named) and str(named).partition("/")[2].lower() == folder.name.lower():
        return str(named)
    return None
