"""What a stage is made from, and what differs between two such descriptions."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mkaq import __version__
from mkaq.digests import digest_of, library_versions

_MOST = 3  # differences that are told
_LONGEST = 40  # characters of a value that is told
_SECTIONS = {"calibrate": "calibration", "analyze": "merge", "evaluate": "evaluate.perplexity"}
_KEYS = {"dtype": "model.dtype", "seed": "calibration.seed", "shard_size": "export.shard_size"}
_MISSING = object()


@dataclass(frozen=True)
class Provenance:
    """Everything that a stage is made from; its fingerprint is the digest of this.

    Attributes:
        stage: Name of the stage.
        settings: Its section of the recipe, and on what it runs; plain data.
        inputs: Names and digests of its inputs.
        mkaq: The version of mkaq.
        libraries: The versions of the libraries that influence numbers.
    """

    stage: str
    settings: Any
    inputs: Mapping[str, str]
    mkaq: str
    libraries: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        """The digest of all of it."""
        rest = {"mkaq": self.mkaq, "libraries": self.libraries}
        return digest_of({"stage": self.stage, "section": self.settings, "inputs": self.inputs, **rest})


def provenance_of(stage: str, settings: Any, inputs: Mapping[str, str]) -> Provenance:
    """What a stage is made from here and now."""
    return Provenance(stage, settings, dict(inputs), __version__, library_versions())


def reason(new: Provenance, stored: Sequence[Provenance | None]) -> str:
    """Why a stage is made although some of the same name are stored.

    Args:
        new: What it is made from.
        stored: What each of those was made from, the oldest first; None if nobody recorded it.
    """
    if new.stage == "evaluate":  # of another model: nothing like it
        stored = [old for old in stored if old is None or old.inputs.keys() == new.inputs.keys()]
    recorded = [old for old in stored if old is not None]
    if not stored:
        return "nothing like it is stored"
    if not recorded:
        return "what is stored was made by a version that did not record why"
    found = min((differences(new, old) for old in reversed(recorded)), key=len)
    if not found:
        return "the stored one is not as it was written"
    more = [f"{len(found) - _MOST} more"] if len(found) > _MOST else []
    return "; ".join(found[:_MOST] + more)


def differences(new: Provenance, old: Provenance) -> list[str]:
    """What differs, each in a few words: settings first, then inputs and versions."""
    found = [_setting(new.stage, *change) for change in _changes(new.settings, old.settings)]
    found += [_input(name, now, then) for (name,), now, then in _changes(new.inputs, old.inputs)]
    versions = {"mkaq": new.mkaq, **new.libraries}, {"mkaq": old.mkaq, **old.libraries}
    return found + [_is_and_was(name, now, then) for (name,), now, then in _changes(*versions)]


def _changes(new: Any, old: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Path, value now and value before of everything in which plain data differ; lists count as values."""
    if isinstance(new, Mapping) and isinstance(old, Mapping):
        for key in [*new, *(key for key in old if key not in new)]:
            yield from _changes(new.get(key, _MISSING), old.get(key, _MISSING), *path, key)
    elif new != old or type(new) is not type(old):
        yield path, new, old


def _setting(stage: str, path: tuple[str, ...], now: Any, then: Any) -> str:
    match path:
        case ("ran_on", ("threads" | "processes") as what):
            return f"it ran with {then} {what} and now with {now}"
        case ("ran_on", "device"):
            return f"it ran on {then} and now on {now}"
        case ("ran_on", "compute_dtype"):
            return f"it ran in {then} and now in {now}"
        case ("ran_on", "fast_bfloat16"):
            return f"it ran {_with(then)} fast bfloat16 and now {_with(now)}"
        case ("candidates",) if stage == "analyze":
            return "the groups that it measures are others"
        case (key,) if stage not in ("calibrate", "artifact") and key in _KEYS:
            return _is_and_was(_KEYS[key], now, then)
    section = () if stage == "artifact" else (_SECTIONS.get(stage, stage),)
    return _is_and_was(".".join((*section, *path)), now, then)


def _input(name: str, now: Any, then: Any) -> str:
    if now is _MISSING:
        return f"it no longer reads {name}"
    return f"it now reads {name}" if then is _MISSING else f"its input {name} is another"


def _is_and_was(name: str, now: Any, then: Any) -> str:
    new, old = _text(now), _text(then)
    if not new and not old:
        return f"{name} is another"
    return f"{name} is {new or 'another'} and was {old or 'another'}"


def _with(has: Any) -> str:
    return "with" if has else "without"


def _text(value: Any) -> str:
    """A value in a few characters; empty if it has none."""
    if value is _MISSING:
        return "not there"
    text = json.dumps(value, ensure_ascii=False)
    text = text[1:-1] if isinstance(value, str) else text
    return "" if isinstance(value, (list, Mapping)) or len(text) > _LONGEST else text
