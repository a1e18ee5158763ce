"""Finds a model: built in, in a local folder, or on the hub."""

import re
from pathlib import Path

from mkaq.checkpoint.side_files import hub_patterns
from mkaq.errors import UsageError
from mkaq.paths import user_path, utf8_path

BUILTIN = {"builtin:tiny-llama": Path(__file__).parent.parent / "builtin" / "tiny-llama"}
_WANTED = ["*.json", "*.safetensors", *hub_patterns()]


def resolve_model(path: str, revision: str | None = None) -> Path:
    """The local folder of a model; only a hub id uses the network.

    Raises:
        UsageError: If there is no such model, the hub does not provide it, or a revision of a local model is
            asked for.
    """
    if path.startswith("builtin:"):
        if path not in BUILTIN:
            raise UsageError("no such built-in model", where=path, fix=f"there is {', '.join(BUILTIN)}")
        return _unpinned(BUILTIN[path], path, revision)
    folder = user_path(path)
    if folder.is_dir():
        return _unpinned(utf8_path(folder), path, revision)
    if folder.exists():
        raise UsageError("is a file; a model is a folder with config.json and .safetensors", where=path)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path):
        raise UsageError("no such model folder", where=path, fix="give a local folder or a hub id (org/name)")
    return _download(path, revision)


def _unpinned(folder: Path, path: str, revision: str | None) -> Path:
    if revision is not None:
        what = f"{path} is on this machine, where there is no revision {revision!r} to take"
        raise UsageError(what, where="model.revision", fix="leave it out; it is for a hub id")
    return folder


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=_WANTED, ignore_patterns=["consolidated*"]
            )
        )
    except Exception as error:  # the hub's client raises a dozen kinds
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"no such folder here, and the hub did not give it ({type(error).__name__}: {reason})",
            where=repository,
            fix="check the name, the network and, for a gated model, `hf auth login`",
        ) from None
