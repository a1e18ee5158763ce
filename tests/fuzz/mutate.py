"""Mutations that keep a file's form: JSON values, safetensors headers, signed manifests, words of YAML."""

import json
import re
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from mkaq.digests import digest_of

Mutate = Callable[[bytes, Random], bytes]
_DEEP: list[Any] = []
for _ in range(900):
    _DEEP = [_DEEP]
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 4, 255, 2**31, 2**63, 2**64, 10**25, 10**400, 0.5, -0.0, 1e308),
    *(float("nan"), float("inf"), "", "0", "x", "é" * 150, "\ud83d", "\0", "../x", "/x", "x" * 300, "None"),
    *([], {}, [0], [[]], {"": 0}, {"x": None}, ["x", "x"], _DEEP),
)
_WORDS = (  # of YAML, with what its types read
    *(
        "!!bool x",
        "!!int x",
        "!!float x",
        "!!timestamp x",
        "!!binary x",
        "!!null x",
        "!!set {x: x}",
        "!!str 1",
    ),
    *("!!int ''", "!!omap [x: 1]", "!!pairs [x: 1]", "!x y", "0x" + "f" * 5000, "0x_", "0b_", "0_", "1:2:3"),
    *(
        "1" + ":00" * 250 + ".5",
        "1e999",
        ".inf",
        ".nan",
        "-.inf",
        "2001-01-01",
        "2001-99-99",
        "=",
        "<<: {x: 1}",
    ),
    *("2001-01-01 1:1:1 +99:99", "&a x", "*a", "? x", "- x", "|", ">", "[", "]", "{", "}", "{}", "[]", "~"),
    *("yes", "null", "''", '"\\ud83d"', '"\\0"', "\ufeff", "\x85", "---", "...", "%YAML 9.9", "#", "\t", "'"),
    *("-1", "0", "0.5", "9" * 400, "4GB", "5%", "gptq", "layerwise", "{a: {a: {a: 1}}}", "[1, [2]]"),
)


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every container with every key or number in it."""
    waiting = [data]
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            yield holder, key
            if isinstance(holder[key], dict | list):
                waiting.append(holder[key])


def _copy(data: Any) -> Any:
    return json.loads(json.dumps(data))


def change(data: Any, random: Random) -> Any:
    """Plain data with one place changed: another value, none, another key, a little more."""
    places = list(_places(data)) if isinstance(data, dict | list) else []
    if not places or random.random() < 0.02:
        return _copy(random.choice(_VALUES))
    holder, key = random.choice(places)
    other, there = random.choice(places)
    value = holder[key]
    match random.randrange(7):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            name = (
                there
                if isinstance(there, str) and random.random() < 0.7
                else str(random.choice(_VALUES))[:400]
            )
            holder[name] = holder.pop(key)
        case 2 if isinstance(value, int | float):
            holder[key] = value + random.choice((-1, 1, 0.5, -value, value))
        case 3:
            holder[key] = _copy(other[there])
        case 4 if isinstance(value, list):
            value.append(_copy(random.choice([*value, *_VALUES])))
        case 5 if isinstance(value, list):
            value.clear()
        case _:
            holder[key] = _copy(random.choice(_VALUES))
    return data


def _changed(data: Any, random: Random) -> Any:
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        data = change(data, random)
    return data


def as_json(data: bytes, random: Random) -> bytes:
    """A JSON file with other values."""
    return json.dumps(_changed(json.loads(data), random)).encode()


def signed(data: bytes, random: Random) -> bytes:
    """A manifest with other values."""
    return sign(_changed(json.loads(data), random))


def sign(manifest: Any) -> bytes:
    """A manifest with the digest that fits it."""
    if isinstance(manifest, dict):
        manifest.pop("digest", None)
        manifest["digest"] = digest_of(manifest)
    return (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode(errors="surrogatepass")


def header(data: bytes, random: Random) -> bytes:
    """A safetensors file with another header, mostly of the length that it says."""
    end = 8 + int.from_bytes(data[:8], "little")
    text = as_json(data[8:end], random)
    if random.random() < 0.05:  # an object as the list of its values, which Rust takes for the same
        text = re.sub(
            rb'{"dtype": ("\w+"), "shape": (\[[^]]*\]), "data_offsets": ', rb"[\1, \2, ", text, count=1
        )
        text = text.replace(b"]}", b"]]", 1)
    if random.random() < 0.1:  # what Python's json reads and others do not, or the other way round
        odd = random.choice((b"1" * 5000, b"NaN", b"[" * 1500, b"-0", b"1E400", b'"\\ud83d"', b"\xff", b" "))
        text = re.sub(rb"}", lambda found: b',"x":' + odd + found[0], text, count=1)
    return len(text).to_bytes(8, "little") + text + data[end:]


def words(data: bytes, random: Random) -> bytes:
    """A recipe or a setting with other words."""
    text = data.decode("utf-8", "surrogateescape")
    found = list(re.finditer(r"[^\s:,{}\[\]=]+", text))
    place = random.choice(found).span() if found else (0, 0)
    keys = [match[0] for match in found] or ["x"]
    new = random.choice(_WORDS if random.random() < 0.7 else keys)
    return (text[: place[0]] + new + text[place[1] :]).encode("utf-8", "surrogateescape")


def numbers(data: bytes, random: Random) -> bytes:
    """A binary file with another number of 32 or 64 bits."""
    size = random.choice((4, 8))
    at = random.randrange(max(len(data) - size, 1))
    value = random.choice(
        (0, 1, 2, 7, 8, 9, 12, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1, random.randrange(256))
    )
    return data[:at] + (value % 2 ** (8 * size)).to_bytes(size, "little") + data[at + size :]


MUTATIONS: dict[str, Mutate] = {
    **dict.fromkeys(("index", "config", "handoff", "origins"), as_json),
    "manifest": signed,
    "header": header,
    "recipe": words,
    "gguf": numbers,
}
