"""The tokens that end a text, from every file that names them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkaq.checkpoint.validate import read_json
from mkaq.errors import CheckpointError


def end_tokens(path: Path, tokenizer: Any) -> set[int]:
    """All end tokens in generation_config.json, config.json and the tokenizer; a chat model has several.

    Ids outside the vocabulary are kept: they never occur.

    Args:
        path: The checkpoint's folder.
        tokenizer: The checkpoint's tokenizer.

    Raises:
        CheckpointError: If `eos_token_id` is neither a token id nor a list of them.
    """
    files = [path / name for name in ("generation_config.json", "config.json") if (path / name).is_file()]
    named = {token for file in files for token in _ids(read_json(file).get("eos_token_id"), file)}
    return named | ({tokenizer.eos_token_id} - {None})


def _ids(value: Any, file: Path) -> Iterator[int]:
    for token in value if isinstance(value, list) else [value]:
        if type(token) is int:
            yield token
        elif value is not None:
            what = f"eos_token_id is {str(value)[:100]!r}, neither a token id nor a list of them"
            raise CheckpointError(what, where=file)
