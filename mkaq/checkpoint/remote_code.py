"""Keys by which a configuration asks for Python code of its repository, which mkaq never runs.

A family that transformers has itself is taken by the library's own class, so the keys are not needed, and
mkaq leaves them out of every file that it writes: nobody who loads an artifact is asked to trust code.
"""

from collections.abc import Mapping
from typing import Any

_ASKS_FOR_CODE = ("auto_map", "custom_pipelines")


def without_remote_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration (config.json, tokenizer_config.json) without the keys that ask for code."""
    return {key: value for key, value in config.items() if key not in _ASKS_FOR_CODE}


def remote_code_keys(config: Mapping[str, Any]) -> list[str]:
    """Which of its keys ask for code."""
    return [key for key in _ASKS_FOR_CODE if config.get(key)]
