"""A tokenizer as llama.cpp's vocabulary; what llama.cpp would read differently is refused.

llama.cpp has a tokenizer of its own. It knows byte-level BPE by the name of the rule that splits text into
words, and SentencePiece's BPE by a score for each token.
"""

import json
from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from mkaq.checkpoint.validate import read_json
from mkaq.errors import UnsupportedError
from mkaq.export.gguf_scores import ordered_scores, stored_scores
from mkaq.export.gguf_splits import UnknownRule, split_name

_PREFIX = {"type": "Prepend", "prepend": "▁"}
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_UNSTRIPPED = {
    "<unk>",
    "<s>",
    "<|endoftext|>",
}  # with "phi-3" in the name all other added tokens are stripped


class Kind(IntEnum):
    """What a token is, as GGUF numbers it."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Vocabulary(NamedTuple):
    """What GGUF says of a vocabulary.

    Attributes:
        model: `gpt2` (byte-level BPE) or `llama` (SentencePiece's BPE).
        pre: The name of the rule that splits text into words.
        tokens: Every token, by id.
        kinds: What each is.
        scores: The score of each, for `llama`: the highest is merged first.
        merges: Pairs in order, for `gpt2`.
        prefix: Whether a text gets a space in front.
        strips: Whether added tokens take the spaces after them, as Phi-3's do.
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[Kind]
    scores: list[float]
    merges: list[str]
    prefix: bool
    strips: bool


def vocabulary(folder: Path, tokenizer: Any, size: int) -> Vocabulary:
    """The vocabulary of a checkpoint's tokenizer.

    The rules are those of the tokenizer as transformers has loaded it, but SentencePiece's spaces are those
    of tokenizer.json: some classes of transformers 5 make rules of their own, without the space after a
    special token.

    Args:
        folder: The checkpoint.
        tokenizer: Its tokenizer, loaded.
        size: Rows of the embedding; numbers without a token become unused tokens.

    Raises:
        UnsupportedError: If llama.cpp would split text in another way, or its way is not known.
        CheckpointError: If a file is damaged.
    """
    where, library = folder / "tokenizer.json", getattr(tokenizer, "backend_tokenizer", None)
    if library is None or not where.is_file():
        raise UnsupportedError("no tokenizer.json, from which GGUF's tokenizer is made", where=folder)
    data = json.loads(library.to_str())
    if data["model"].get("byte_fallback"):
        data |= {key: read_json(where).get(key) for key in ("normalizer", "pre_tokenizer")}
        data["model"]["unk_token"] = tokenizer.unk_token
    if max(data["model"]["vocab"].values(), default=0) >= size:
        raise UnsupportedError(f"it has tokens beyond the {size} rows of the embedding", where=where)
    names = {number: token for token, number in library.get_vocab(with_added_tokens=True).items()}
    names = {number: token for number, token in names.items() if number < size}  # classes may add one more
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < size]
    try:
        return _vocabulary(data, size, names, where)
    except UnknownRule as error:
        what = f"llama.cpp would split text in another way than this tokenizer: {error}"
        raise UnsupportedError(what, where=where, fix="leave gguf out of export.formats") from None


def _vocabulary(data: Mapping[str, Any], size: int, names: Mapping[int, str], where: Path) -> Vocabulary:
    model, added = data["model"], data["added_tokens"]
    tokens = [names.get(number, f"[PAD{number}]") for number in range(size)]
    if model["type"] != "BPE" or any(
        model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    ):
        raise UnknownRule(f"its model is {model['type']} with options of its own")
    if len(set(tokens)) < len(tokens) or "" in tokens:
        raise UnknownRule("two tokens have the same text, or one has none")
    strips, merges = _strips(added, tokens), [(left, right) for left, right in model["merges"]]
    by_number = {token["id"]: token for token in added}
    unknown = model.get("unk_token") if model.get("byte_fallback") else None
    kinds = [_kind(number, token, names, by_number, unknown) for number, token in enumerate(tokens)]
    if not model.get("byte_fallback"):
        pre = split_name(data, bool(model.get("ignore_merges")))
        joined = [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in merges]
        return Vocabulary("gpt2", pre, tokens, kinds, [], joined, False, strips)
    prefix = _sentencepiece(data, tokens, by_number)
    kinds = [Kind.BYTE if token in _BYTES else kind for token, kind in zip(tokens, kinds, strict=True)]
    own = where.with_name("tokenizer.model")
    normal = [kind == Kind.NORMAL for kind in kinds]
    scores = stored_scores(own, tokens, normal) if own.is_file() else ordered_scores(merges, tokens, normal)
    return Vocabulary("llama", "default", tokens, kinds, scores, [], prefix, strips)


def _kind(
    number: int, token: str, names: Mapping[int, str], added: Mapping[int, Any], unknown: str | None
) -> Kind:
    if number not in names:
        return Kind.UNUSED
    if token == unknown:
        return Kind.UNKNOWN
    if number not in added:
        return Kind.NORMAL
    return Kind.CONTROL if added[number]["special"] else Kind.USER_DEFINED


def _strips(added: Sequence[Mapping[str, Any]], tokens: Sequence[str]) -> bool:
    """Whether added tokens take the spaces after them; llama.cpp knows those of Phi-3, or none."""
    for token in added:
        if token["lstrip"] or token["single_word"]:
            raise UnknownRule(f"the added token {token['content']!r} has lstrip or single_word")
    flags = {token["rstrip"] for token in added if token["content"] not in _UNSTRIPPED}
    if len(flags) > 1 or any(token["rstrip"] for token in added if token["content"] in _UNSTRIPPED):
        raise UnknownRule("some of its added tokens have rstrip, and others do not")
    if flags == {True} and not {*_UNSTRIPPED, "</s>"} <= set(tokens):
        raise UnknownRule("its added tokens have rstrip, and are not those of Phi-3")
    return flags == {True}


def _sentencepiece(data: Mapping[str, Any], tokens: Sequence[str], added: Mapping[int, Any]) -> bool:
    """Whether a text gets a space in front; raises `UnknownRule` if this is not SentencePiece's BPE."""
    model, normalizer = data["model"], data["normalizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    if data["pre_tokenizer"] or model.get("ignore_merges") or steps not in ([_SPACES], [_PREFIX, _SPACES]):
        rules = {key: data[key] for key in ("normalizer", "pre_tokenizer")}
        raise UnknownRule(
            f"llama.cpp puts a space before every piece of text, or never; this does {rules!s:.300}"
        )
    if not set(_BYTES) <= set(tokens):
        raise UnknownRule("some byte has no token")
    if normalized := [token["content"] for token in added.values() if token["normalized"]]:
        raise UnknownRule(f"the added token {normalized[0]!r} is normalized")
    return bool(steps[0] == _PREFIX)
