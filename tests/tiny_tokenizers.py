"""Tokenizers for the tiny models: byte-level BPE with other rules, and SentencePiece's BPE."""

import json
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceTrainer
from transformers import AutoTokenizer

from tests.tiny import edit_config, write_text

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2 = BYTES | {"use_regex": True}


def split(rule: str) -> dict[str, Any]:
    """A step that splits text by a regular expression."""
    return {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False}


RULES: dict[str, tuple[list[dict[str, Any]], bool]] = {  # by llama.cpp's names; whether words skip the merges
    "gpt-2": ([GPT2], False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, GPT2], False),
    "llama-bpe": ([split(_WORDS), BYTES], True),
    "smaug-bpe": ([split(_WORDS), BYTES], False),
    "qwen2": ([split(_WORDS.replace("{1,3}", "")), BYTES], False),
}
ADDED = {4000: ("<|im_start|>", True), 4001: ("<|im_end|>", True), 4002: ("<tool>", False)}


def added_token(number: int, text: str, special: bool, **flags: bool) -> dict[str, Any]:
    """An entry of `added_tokens`."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": text, "special": special, **plain, **flags}


def use_rules(folder: Path, name: str) -> None:
    """Gives a model's tokenizer other rules, and added tokens in the place of some of its own."""
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    parts, data["model"]["ignore_merges"] = RULES[name]
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    words = data["model"]["vocab"]
    gone = {word for word, number in words.items() if number in ADDED}
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in data["model"]["merges"]]
    data["model"]["merges"] = [pair for pair in pairs if not gone & {*pair, "".join(pair)}]
    data["model"]["vocab"] = {word: number for word, number in words.items() if word not in gone}
    data["model"]["vocab"] |= {text: number for number, (text, _) in ADDED.items()}
    data["added_tokens"] += [added_token(number, *token) for number, token in ADDED.items()]
    path.write_text(json.dumps(data))


PHI3 = ("<|endoftext|>", "<|user|>", "<|end|>")


def use_sentencepiece(folder: Path, *, prefix: bool = True, own: bool = True, phi3: bool = False) -> None:
    """Gives a model a tokenizer of SentencePiece, with a tokenizer.json as Llama 2's.

    Args:
        folder: The model.
        prefix: Whether a text gets a space in front.
        own: Whether tokenizer.model stays.
        phi3: Whether it has Phi-3's added tokens, most of which take the spaces after them.
    """
    settings = {"vocab_size": 2000, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    exact = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    text = write_text(folder / "text.txt")
    SentencePieceTrainer.train(input=str(text), model_prefix=str(folder / "tokenizer"), **settings, **exact)
    for name in ("tokenizer.json", "tokenizer.vocab", "text.txt"):
        (folder / name).unlink()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True} | names))
    edit_config(folder, bos_token_id=1, eos_token_id=2)
    data = json.loads(AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str())
    steps = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    data |= {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}
    if phi3:
        data["added_tokens"][2] |= {"rstrip": True, "special": False}  # </s>
        data["added_tokens"] += [
            added_token(2000 + n, text, True, rstrip=n > 0) for n, text in enumerate(PHI3)
        ]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    config.write_text(json.dumps({"tokenizer_class": "TokenizersBackend"} | names))
    if not own:
        (folder / "tokenizer.model").unlink()
