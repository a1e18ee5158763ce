"""A model's files beside its weights: tokenizer, chat templates, settings, licence.

Every stage and the artifact get copies of them. README.md is left out, because an artifact has a model card
of its own; so is Python code; and so is the configuration of another format (`params.json`), which would be
wrong for a model with other layers.
"""

import json
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from mkaq.checkpoint.remote_code import remote_code_keys, without_remote_code

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",  # SentencePiece, under any name
    "tokenizer.model.v*",
    "tekken.json",
    "*.tiktoken",
)
_CHAT = ("*.jinja", "chat_template.json", "additional_chat_templates/*.jinja", "SYSTEM_PROMPT*.txt")
_SETTINGS = ("generation_config.json",)
_TERMS = ("license", "licence", "notice", "use_policy", "copying", "copyright")
_TERMS_ENDINGS = ("", ".txt", ".md", ".rst", ".html", ".pdf")
_PATTERNS = (*_SETTINGS, *_TOKENIZER, *_CHAT)
_FOLDERS = ("additional_chat_templates",)


def hub_patterns() -> list[str]:
    """The patterns of files to download from a hub, where case matters."""
    terms = [f"*{form}*" for term in _TERMS for form in (term.upper(), term.capitalize(), term)]
    return [*_PATTERNS, *terms]


def side_files(folder: Path) -> list[str]:
    """The names of all side files, relative to the folder, sorted."""
    inside = [
        path for name in ("", *_FOLDERS) if (folder / name).is_dir() for path in (folder / name).iterdir()
    ]
    names = (path.relative_to(folder).as_posix() for path in inside if path.is_file())
    return sorted(name for name in names if _belongs(name))


def _belongs(name: str) -> bool:
    if name.endswith(".py"):
        return False
    if any(_matches(name, pattern) for pattern in _PATTERNS):
        return True
    path = PurePosixPath(name.lower())
    return "/" not in name and path.suffix in _TERMS_ENDINGS and any(term in path.stem for term in _TERMS)


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def copy_side_files(source: Path, folder: Path) -> None:
    """Copies the side files; tokenizer_config.json without the keys that ask for code."""
    for name in side_files(source):
        data = (source / name).read_bytes()
        if name == "tokenizer_config.json":
            data = _without_code(data)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def _without_code(data: bytes) -> bytes:
    try:
        config = json.loads(data)
    except (ValueError, RecursionError):
        return data  # invalid JSON is reported where the file is read
    if not isinstance(config, dict) or not remote_code_keys(config):
        return data
    return (json.dumps(without_remote_code(config), indent=2, ensure_ascii=False) + "\n").encode()


def stays_inside(folder: Path, name: str) -> bool:
    """Whether a name is a path below the folder that stays there when links are followed.

    A snapshot in the hub's cache links to blobs next to it, which counts as inside.
    """
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or str(path) != name:
        return False
    try:
        root = folder.resolve()
        root = root.parent.parent if root.parent.name == "snapshots" else root
        return (folder / name).resolve().is_relative_to(root)
    except (OSError, RuntimeError, ValueError):  # a cycle of links; an invalid name
        return False
