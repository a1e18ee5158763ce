"""A tokenizer.json as llama.cpp's vocabulary; what llama.cpp would read differently is refused.

llama.cpp has a tokenizer of its own. It knows byte-level BPE by the name of the rule that splits text into
words, and SentencePiece's BPE by a score for each token. One difference is left: it does not apply NFC, which
Qwen's tokenizers do, so their ids agree for text that is in NFC already, as nearly all text is.
"""

from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from mkaq.errors import CheckpointError, UnsupportedError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {  # the rules, and whether whole words skip the merges: llama_vocab::impl::load in llama-vocab.cpp
    ((_GPT2,), False): "gpt-2",
    ((r"\p{N}", _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_LLAMA3.replace("{1,3}", ""),), False): "qwen2",
}
_PREFIX = {"type": "Prepend", "prepend": "▁"}
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_UNSTRIPPED = {"<unk>", "<s>", "<|endoftext|>"}  # with "phi-3" in the name all other added tokens are stripped


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


def vocabulary(folder: Path, size: int) -> Vocabulary:
    """The vocabulary in a folder's tokenizer.json.

    Args:
        folder: The checkpoint.
        size: Rows of the embedding; numbers without a token become unused tokens.

    Raises:
        UnsupportedError: If llama.cpp would split text in another way, or its way is not known.
        CheckpointError: If the file is damaged.
    """
    import json

    from tokenizers import Tokenizer

    where = folder / "tokenizer.json"
    if not where.is_file():
        raise UnsupportedError("no tokenizer.json, from which GGUF's tokenizer is made", where=folder)
    try:
        library = Tokenizer.from_file(str(where))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"is no tokenizer that can be read: {str(error)[:200]}", where=where) from None
    data = json.loads(library.to_str())
    names = {number: token for token, number in library.get_vocab(with_added_tokens=True).items()}
    if names and max(names) >= size:
        what = f"token {max(names)} is beyond the {size} rows of the embedding"
        raise UnsupportedError(what, where=where)
    try:
        return _vocabulary(data, [names.get(number, f"[PAD{number}]") for number in range(size)], names, where)
    except _Unknown as error:
        what = f"llama.cpp would split text in another way than this tokenizer: {error}"
        raise UnsupportedError(what, where=where, fix="leave gguf out of export.formats") from None


class _Unknown(Exception):
    """What llama.cpp has no equal of."""


def _vocabulary(
    data: Mapping[str, Any], tokens: list[str], names: Mapping[int, str], where: Path
) -> Vocabulary:
    model, added = data["model"], data["added_tokens"]
    if model["type"] != "BPE" or any(
        model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    ):
        raise _Unknown(f"its model is {model['type']} with options of its own")
    if len(set(tokens)) < len(tokens) or "" in tokens:
        raise _Unknown("two tokens have the same text, or one has none")
    strips, merges = _strips(added), [(left, right) for left, right in model["merges"]]
    by_number = {token["id"]: token for token in added}
    unknown = model.get("unk_token") if model.get("byte_fallback") else None
    kinds = [_kind(number, token, names, by_number, unknown) for number, token in enumerate(tokens)]
    if not model.get("byte_fallback"):
        pre = _split(data, bool(model.get("ignore_merges")))
        joined = [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in merges]
        return Vocabulary("gpt2", pre, tokens, kinds, [], joined, False, strips)
    prefix = _sentencepiece(data, tokens, by_number)
    kinds = [Kind.BYTE if token in _BYTES else kind for token, kind in zip(tokens, kinds, strict=True)]
    own = where.with_name("tokenizer.model")
    normal = [kind == Kind.NORMAL for kind in kinds]
    scores = _stored(own, tokens, normal) if own.is_file() else _ordered(merges, tokens, normal)
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


def _strips(added: Sequence[Mapping[str, Any]]) -> bool:
    """Whether added tokens take the spaces after them; llama.cpp knows all or none."""
    for token in added:
        if token["lstrip"] or token["single_word"]:
            raise _Unknown(f"the added token {token['content']!r} has lstrip or single_word")
    flags = {token["rstrip"] for token in added if token["content"] not in _UNSTRIPPED}
    if len(flags) > 1 or any(token["rstrip"] for token in added if token["content"] in _UNSTRIPPED):
        raise _Unknown("some of its added tokens have rstrip, and others do not")
    return flags == {True}


def _split(data: Mapping[str, Any], whole_words: bool) -> str:
    """llama.cpp's name of the rules that split text before byte-level BPE."""
    if (data["normalizer"] or {"type": "NFC"}) != {"type": "NFC"}:
        raise _Unknown(f"its normalizer is {data['normalizer']['type']}")
    before = data["pre_tokenizer"] or {}
    parts = before.get("pretokenizers", [before])
    if not parts or parts[-1].get("type") != "ByteLevel":
        raise _Unknown("it is neither byte-level nor SentencePiece's BPE")
    rules = tuple(rule for part in parts for rule in _rules(part))
    if (rules, whole_words) not in _SPLITS:
        known = ", ".join(_SPLITS.values())
        raise _Unknown(f"its rule for words is none of {known}: {' then '.join(rules)[:200]}")
    return _SPLITS[rules, whole_words]


def _rules(part: Mapping[str, Any]) -> Iterator[str]:
    match part:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use}:
            yield from [_GPT2] if use else []
        case {"type": "Digits", "individual_digits": True}:
            yield r"\p{N}"
        case {"type": "Split", "pattern": {"Regex": str(rule)}, "behavior": "Isolated", "invert": False}:
            yield rule
        case _:
            raise _Unknown(f"it splits text with {dict(part)!s:.200}")


def _sentencepiece(data: Mapping[str, Any], tokens: Sequence[str], added: Mapping[int, Any]) -> bool:
    """Whether a text gets a space in front; raises `_Unknown` if this is not SentencePiece's BPE."""
    model, normalizer = data["model"], data["normalizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    if data["pre_tokenizer"] or model.get("ignore_merges") or steps not in ([_SPACES], [_PREFIX, _SPACES]):
        rules = {key: data[key] for key in ("normalizer", "pre_tokenizer")}
        raise _Unknown(f"llama.cpp puts a space before every piece of text, or never; this does {rules!s:.300}")
    if not set(_BYTES) <= set(tokens):
        raise _Unknown("some byte has no token")
    if normalized := [token["content"] for token in added.values() if token["normalized"]]:
        raise _Unknown(f"the added token {normalized[0]!r} is normalized")
    return steps[0] == _PREFIX


def _stored(path: Path, tokens: Sequence[str], normal: Sequence[bool]) -> list[float]:
    """The scores in tokenizer.model, which must have the same tokens."""
    from sentencepiece import SentencePieceProcessor

    try:
        pieces = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        what = f"is no sentencepiece vocabulary: {str(error)[:100]}"
        raise CheckpointError(what, where=path) from None
    size = pieces.get_piece_size()
    for number, (token, plain) in enumerate(zip(tokens, normal, strict=True)):
        if plain and (number >= size or pieces.id_to_piece(number) != token):
            raise _Unknown(f"token {number} is {token!r}, in tokenizer.model it is another")
    last = -float(len(tokens))
    return [float(pieces.get_score(n)) if plain else last for n, plain in enumerate(normal)]


def _ordered(
    merges: Sequence[tuple[str, str]], tokens: Sequence[str], normal: Sequence[bool]
) -> list[float]:
    """Scores that make llama.cpp, which merges into any token, do what a list of merges does."""
    rank: dict[str, int] = {}
    previous = None
    for pair in merges:
        whole = "".join(pair)
        if whole != previous and rank.setdefault(whole, len(rank)) != len(rank) - 1:
            raise _Unknown(f"the merges that make {whole!r} lie apart")
        previous = whole
    known, listed = {t for t, plain in zip(tokens, normal, strict=True) if plain}, set(merges)
    for token in known:
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair[0] in known and pair[1] in known and pair not in listed:
                raise _Unknown(f"there is no merge of {pair[0]!r} and {pair[1]!r}, which make a token")
    last = -float(len(tokens))
    return [-float(rank[t]) if plain and t in rank else last for t, plain in zip(tokens, normal, strict=True)]
