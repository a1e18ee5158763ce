"""The rules that split text into words before byte-level BPE, by llama.cpp's names.

Tekken's is not here: llama.cpp approximates it. One difference is left: llama.cpp does not apply NFC, which
Qwen's tokenizers do, so their ids agree for text that is in NFC already, as nearly all text is.
"""

from collections.abc import Iterator, Mapping
from typing import Any

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


class UnknownRule(Exception):
    """What llama.cpp has no equal of."""


def split_name(data: Mapping[str, Any], whole_words: bool) -> str:
    """The name of a tokenizer's rules.

    Args:
        data: Its tokenizer.json.
        whole_words: Whether words that are tokens skip the merges.

    Raises:
        UnknownRule: If llama.cpp has no such rules.
    """
    if (data["normalizer"] or {"type": "NFC"}) != {"type": "NFC"}:
        raise UnknownRule(f"its normalizer is {data['normalizer']['type']}")
    before = data["pre_tokenizer"] or {}
    parts = before.get("pretokenizers", [before])
    if not parts or parts[-1].get("type") != "ByteLevel":
        raise UnknownRule("it is neither byte-level nor SentencePiece's BPE")
    rules = tuple(rule for part in parts for rule in _rules(part))
    if (rules, whole_words) not in _SPLITS:
        known = ", ".join(_SPLITS.values())
        raise UnknownRule(f"its rule for words is none of {known}: {' then '.join(rules)[:200]}")
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
            raise UnknownRule(f"it splits text with {dict(part)!s:.200}")
