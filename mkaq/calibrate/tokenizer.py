"""The tokenizer of a checkpoint; if it cannot be loaded, what is missing and what to do."""

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mkaq.checkpoint.remote_code import remote_code_keys, without_remote_code
from mkaq.checkpoint.side_files import copy_side_files, side_files
from mkaq.checkpoint.validate import read_json
from mkaq.errors import CheckpointError, UsageError
from mkaq.files import write_json

_CONFIG = "tokenizer_config.json"
_PACKAGES = {  # what reading a vocabulary needs: module to look for, package to install
    "sentencepiece": {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"},
    "tiktoken": {"tiktoken": "tiktoken"},
}


def load_tokenizer(path: Path) -> Any:
    """Loads the tokenizer of a checkpoint with a class of transformers.

    Raises:
        CheckpointError: If no tokenizer can be used without remote code.
    """
    configs = {name: read_json(path / name) for name in ("config.json", _CONFIG) if (path / name).is_file()}
    if not any(remote_code_keys(config) for config in configs.values()):
        return _load(path, path)
    _check_class(configs.get(_CONFIG, {}), path / _CONFIG)
    with TemporaryDirectory() as scratch:  # as in the artifact: no auto_map and no code
        copy_side_files(path, Path(scratch))
        write_json(Path(scratch) / "config.json", without_remote_code(configs.get("config.json", {})))
        return _load(Path(scratch), path)


def chat_tokens(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], where: object, *, ask: bool = True
) -> list[int]:
    """The tokens of a conversation, written by the tokenizer's chat template.

    Args:
        tokenizer: It has a chat template.
        messages: Roles and texts.
        where: What an error names.
        ask: Whether the beginning of an answer follows.

    Raises:
        UsageError: If the template fails.
    """
    try:
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=ask, tokenize=False)
    except Exception as error:  # a template is a program of the model's author
        raise UsageError(f"the chat template fails: {str(error)[:200]}", where=where) from None
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _load(folder: Path, path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokens = tokenizer("To be", add_special_tokens=False)["input_ids"]
    except Exception as error:  # every tokenizer library raises its own kinds
        what, fix = _diagnosis(path, " ".join(str(error).split())[:200])
        raise CheckpointError(f"no usable tokenizer here: {what}", where=path, fix=fix) from None
    if not len(tokens):  # without its files a tokenizer is empty, without an error
        what, fix = _diagnosis(path, "its vocabulary is empty")
        raise CheckpointError(f"no usable tokenizer here: {what}", where=path, fix=fix)
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def _check_class(config: dict[str, Any], where: Path) -> None:
    """Refuses a tokenizer that needs code from its repository."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    name = config.get("tokenizer_class")
    if not config.get("auto_map") or name is None:
        return
    plain = str(name).removesuffix("Fast")
    if not any(tokenizer_class_from_name(known) for known in (str(name), plain, f"{plain}Fast")):
        raise CheckpointError(
            f"the tokenizer ({str(name)[:60]}) is remote code (auto_map), which mkaq never runs", where=where
        )


def _diagnosis(path: Path, reason: str) -> tuple[str, str]:
    """What is wrong with a tokenizer, and what to do: the advice of libraries often does not help.

    Args:
        path: The model's folder.
        reason: A library's error message.
    """
    again = "get the tokenizer's files again, from where the model is from"
    names = side_files(path)
    if "tokenizer.json" in names:
        return reason, again
    vocabulary = next((name for name in names if name.endswith((".model", ".tiktoken"))), None)
    if vocabulary is None:
        if {"vocab.json", "vocab.txt", "tekken.json"} & set(names):
            return reason, again
        return "there is no tokenizer.json and no tokenizer.model", again
    kind = "tiktoken" if _is_tiktoken(path / vocabulary) else "sentencepiece"
    missing = [package for module, package in _PACKAGES[kind].items() if not _installed(module)]
    if missing:
        packages = " ".join(missing)
        return f"{vocabulary} is a {kind} vocabulary, which needs {packages}", f"pip install {packages}"
    if kind == "sentencepiece":
        return f"{vocabulary} is no {kind} vocabulary that can be read", again
    return reason, again


def _is_tiktoken(path: Path) -> bool:
    """Whether a vocabulary is text: on each line a token in base64 and its number."""
    with path.open("rb") as file:
        return re.match(rb"[A-Za-z0-9+/=]+ \d+\r?\n", file.read(4096)) is not None


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False
