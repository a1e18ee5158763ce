"""The tokens that end a text, wherever a checkpoint names them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkaq.checkpoint.validate import read_json
from mkaq.errors import CheckpointError


def end_tokens(path: Path, tokenizer: Any) -> set[int]:
    """Every end token of generation_config.json, config.json and the tokenizer: a chat model has several.

    An id that no token has ends nothing and does no harm.

    Args:
        path: The checkpoint's folder.
        tokenizer: Its own.

    Raises:
        CheckpointError: If `eos_token_id` is neither a token id nor a list of them.
    """
    files = [path / name for name in ("generation_config.json", "config.json") if (path / name).is_file()]
    named = {token for file in files for token in _ids(read_json(file).get("eos_token_id"), file)}
    return named | ({tokenizer.eos_token_id} - {None})


def _ids(given: Any, file: Path) -> Iterator[int]:
    for token in given if isinstance(given, list) else [given]:
        if type(token) is int:
            yield token
        elif given is not None:
            what = f"eos_token_id is {str(given)[:100]!r}, neither a token id nor a list of them"
            raise CheckpointError(what, where=file)
