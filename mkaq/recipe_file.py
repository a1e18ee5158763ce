"""Reading a recipe: YAML, overrides, and all faults at once, each with its line, key and a suggestion."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from mkaq.errors import MkaqError, UnsupportedError, UsageError
from mkaq.recipe import Recipe
from mkaq.recipe_keys import known_keys, scalars_of
from mkaq.recipe_yaml import Loader, NoValueError
from mkaq.shipped import LISTED
from mkaq.stages.base import NO_TEXT
from mkaq.units import human

_LARGEST = 1_000_000  # bytes


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file, applies `KEY=VALUE` overrides, and validates it.

    Args:
        path: The YAML file.
        overrides: Dotted keys with values, such as `merge.ratio=0.25`. For a key that holds text (a path,
            name or size) the value is taken literally, except `null` if the key may be null; for other keys
            it is parsed as YAML.

    Raises:
        UsageError: With every fault of the file, each with its line and key.
        UnsupportedError: If the only faults are options that this version does not have.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)  # no more of a device, which has no end
        text = data.decode()
    except FileNotFoundError:
        raise UsageError("no such recipe", where=path, fix=LISTED) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot be read: {reason}", where=path, fix="name a YAML file") from None
    if len(data) > _LARGEST:
        raise UsageError(f"is larger than {human(_LARGEST)}: no recipe", where=path)
    settings, lines = _parse_yaml(text, path)
    for override in overrides:
        _apply(settings, lines, override)
    faults, unsupported = _faults(settings)
    if not faults and not unsupported:
        return Recipe.model_validate(settings)
    raise _report(path, lines, faults, unsupported)


def _parse_yaml(text: str, path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    """The file's data, and for each key path its position (`line N`)."""
    lines: dict[tuple[str, ...], str] = {}
    repeated: list[str] = []

    def visit(node: yaml.Node, keys: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise yaml.YAMLError(f"a key that is no text in line {key.start_mark.line + 1}")
                key_path = (*keys, str(key.value))
                line = f"line {key.start_mark.line + 1}"
                if key.value in seen:
                    repeated.append(f"  {line}, {'.'.join(key_path)}: given twice")
                seen.add(key.value)
                lines[key_path] = line
                visit(value, key_path)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                lines[(*keys, str(index))] = f"line {value.start_mark.line + 1}"
                visit(value, (*keys, str(index)))

    try:
        loader = Loader(text)
        root = loader.get_single_node()
        if root is not None:
            visit(root, ())
        data = None if root is None else loader.construct_document(root)
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split()).replace('in "<unicode string>", ', "in ")
        raise UsageError(f"is not YAML: {reason[:300]}", where=path) from None
    if repeated:
        raise UsageError("faults in the recipe:\n" + "\n".join(repeated), where=path)
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise UsageError("is not a mapping of recipe keys", where=path, fix="`mkaq schema` describes them")
    return data, lines


def _apply(data: dict[str, Any], lines: dict[tuple[str, ...], str], override: str) -> None:
    key, sign, value = override.partition("=")
    keys = tuple(key.strip().split("."))
    if not sign or not all(keys):
        raise UsageError(
            f"{override!r} is not KEY=VALUE", where="--set", fix="for example --set merge.ratio=0.25"
        )
    parsed = _value(keys, value, key)
    section: Any = data
    for part in keys[:-1]:
        at = _position(section, part, key)
        if section[at] is None:
            section[at] = {}
        section = section[at]
    section[_position(section, keys[-1], key)] = parsed
    for inner in [path for path in lines if path[: len(keys)] == keys]:
        del lines[inner]  # what stood in the file is no longer meant
    lines[keys] = f"--set {key}"


def _position(section: Any, part: str, key: str) -> Any:
    """Where a part of a key is in a section, which gets it, or in a list, which must have it."""
    if isinstance(section, dict):
        section.setdefault(part, None)
        return part
    if isinstance(section, list) and part.isdecimal() and int(part) < len(section):
        return int(part)
    what = (
        f"a list of {len(section)}, numbered from 0" if isinstance(section, list) else "a value, no section"
    )
    raise UsageError(f"{key.partition('.' + part)[0]} holds {what}", where=f"--set {key}")


def _value(keys: tuple[str, ...], text: str, where: str) -> Any:
    """The value of `--set KEY=TEXT`: the text itself if the key holds text, else parsed as YAML."""
    kinds = scalars_of(keys)
    if kinds == {str} or (kinds == {str, NoneType} and text != "null"):
        return text
    try:
        return yaml.load(text, Loader)
    except NoValueError as error:
        raise UsageError(str(error.problem), where=f"--set {where}") from None
    except yaml.YAMLError:
        return text
    except RecursionError as error:
        raise UsageError(f"not a value: {str(error)[:200]}", where=f"--set {where}") from None


def _faults(data: dict[str, Any]) -> tuple[dict[tuple[str, ...], str], dict[tuple[str, ...], str]]:
    """Faults by key path, and separately the options that this version does not support."""
    unsupported: dict[tuple[str, ...], str] = {}
    formats = data["export"].get("formats") if isinstance(data.get("export"), dict) else None
    if isinstance(formats, list) and "onnx" in formats:
        unsupported["export", "formats"] = "onnx is made from the safetensors by ONNX Runtime's model builder"
    faults: dict[tuple[str, ...], str] = {}
    try:
        Recipe.model_validate(data)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            keys = _key_path(item["loc"], data, item["type"] in ("missing", "extra_forbidden"))
            if item["type"] == "fault_at":
                keys = tuple(item["ctx"]["key"].split("."))
            if any(keys[: len(prefix)] == prefix for prefix in unsupported):
                continue
            message = _message(item, keys)
            earlier = faults.get(keys)
            if earlier is None:
                faults[keys] = message
            elif message not in earlier:
                faults[keys] = f"{earlier}, or {message.partition(' (')[0]}"
    return faults, unsupported


def _key_path(loc: tuple[int | str, ...], data: Any, last_is_key: bool) -> tuple[str, ...]:
    """pydantic's location without its union tags: the keys that the user wrote."""
    keys: list[str] = []
    for index, part in enumerate(loc):
        inside = dict(enumerate(data)) if isinstance(data, list) else data
        if isinstance(inside, dict) and part in inside:
            data = inside[part]
        elif not (last_is_key and index == len(loc) - 1):
            continue
        keys.append(str(part))
    return tuple(keys)


def _message(item: Any, keys: tuple[str, ...]) -> str:
    kind, given = item["type"], item.get("input")
    if kind == "extra_forbidden":
        known = sorted(known_keys(keys[:-1]))
        matches = difflib.get_close_matches(keys[-1], known, n=1)
        hint = f"did you mean {matches[0]!r}?" if matches else f"known here: {', '.join(known)}"
        return f"unknown key ({hint})"
    if kind == "missing":
        return "is required"
    if kind == "literal_error":
        expected = item["ctx"]["expected"]
        options = re.findall(r"'([^']*)'", expected)
        matches = difflib.get_close_matches(str(given), options, n=1)
        return f"must be {expected}, not {given!r}" + (f" (did you mean {matches[0]!r}?)" if matches else "")
    if kind == "value_error":
        return str(item["ctx"]["error"])
    if kind == "fault_at":
        return str(item["ctx"]["message"])
    if kind == "union_tag_invalid":
        return f"method must be one of {item['ctx']['expected_tags']}, not {item['ctx']['tag']!r}"
    if kind == "union_tag_not_found":
        methods = (get_args(kind) for kind in scalars_of((*keys, "method")))
        return f"method is required: {' or '.join(sorted(name for names in methods for name in names))}"
    if kind == "string_pattern_mismatch" and keys[-1:] == ("perplexity_increase",):
        return f"{given!r} is not a percentage such as 5%"
    if kind == "string_pattern_mismatch":
        return f"{given!r} may hold letters, digits, dots, dashes and underscores only"
    if kind == "string_unicode":
        return NO_TEXT
    message = str(item["msg"])
    return f"{message[0].lower()}{message[1:]}" + (
        "" if isinstance(given, dict | list) else f", not {given!r}"
    )


def _report(
    path: Path,
    lines: dict[tuple[str, ...], str],
    faults: dict[tuple[str, ...], str],
    unsupported: dict[tuple[str, ...], str],
) -> MkaqError:
    def line_of(keys: tuple[str, ...]) -> str:
        for end in range(len(keys), 0, -1):
            if keys[:end] in lines:
                return lines[keys[:end]]
        return next((line for inner, line in lines.items() if inner[: len(keys)] == keys), "line 1")

    everything = {**faults, **unsupported}
    listed = sorted((line_of(keys), keys, text) for keys, text in everything.items())
    listed.sort(key=lambda row: int(row[0].split()[1]) if row[0].startswith("line") else 10**9)
    rows = [f"  {_place(where, '.'.join(keys) or 'recipe')}: {text}" for where, keys, text in listed]
    count = f"{len(rows)} fault{'s' if len(rows) > 1 else ''}"
    kind = UsageError if faults else UnsupportedError
    return kind(
        f"{count} in the recipe:\n" + "\n".join(rows), where=path, fix="`mkaq schema` describes every key"
    )


def _place(where: str, key: str) -> str:
    return where if where == f"--set {key}" else f"{where}, {key}"
