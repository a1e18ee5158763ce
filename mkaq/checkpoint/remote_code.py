"""Configuration keys that ask for Python code from the model's repository, which mkaq never runs.

transformers has classes of its own for the supported families, so the keys are not needed. mkaq leaves them
out of every file that it writes, so loading an artifact never requires trust in remote code.
"""

from collections.abc import Mapping
from typing import Any

_ASKS_FOR_CODE = ("auto_map", "custom_pipelines")


def without_remote_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration (config.json, tokenizer_config.json) without the keys that ask for code."""
    return {key: value for key, value in config.items() if key not in _ASKS_FOR_CODE}


def remote_code_keys(config: Mapping[str, Any]) -> list[str]:
    """The keys of a configuration that ask for code."""
    return [key for key in _ASKS_FOR_CODE if config.get(key)]
