"""A checkpoint's tokenizer in the metadata of a GGUF file: vocabulary, special tokens, chat template."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkaq.calibrate.tokenizer import load_tokenizer
from mkaq.checkpoint.end_tokens import end_tokens
from mkaq.errors import UnsupportedError
from mkaq.export.gguf_vocabulary import Vocabulary, vocabulary

if TYPE_CHECKING:
    from gguf import GGUFWriter

_ENDS = {  # llama.cpp takes these texts as ends, whatever the file says (special_eog_ids in llama-vocab.cpp)
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>"),
    *("<EOT>", "<|end_of_text|>", "<eos>"),
}


def add_tokenizer(writer: GGUFWriter, folder: Path, size: int) -> Vocabulary:
    """Adds all keys of the tokenizer.

    Args:
        writer: Where they go.
        folder: The checkpoint.
        size: Rows of the embedding.

    Raises:
        UnsupportedError: If llama.cpp would tokenize, or end a text, in another way.
        CheckpointError: If there is no tokenizer that can be used.
    """
    tokenizer = load_tokenizer(folder)
    words = vocabulary(folder, tokenizer, size)
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    if words.scores:
        writer.add_token_scores(words.scores)
    writer.add_token_types([int(kind) for kind in words.kinds])
    if words.merges:
        writer.add_token_merges(words.merges)
    if words.model == "llama":
        writer.add_add_space_prefix(words.prefix)
    _add_special(writer, folder, tokenizer, words)
    _add_template(writer, tokenizer.chat_template)
    return words


def _add_special(writer: GGUFWriter, folder: Path, tokenizer: Any, words: Vocabulary) -> None:
    size = len(words.tokens)
    plain, full = ([*tokenizer("a", add_special_tokens=wanted)["input_ids"]] for wanted in (False, True))
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    before, after = full[: _start(full, plain)], full[_start(full, plain) + len(plain) :]
    if before not in ([], [first]) or after not in ([], [last]):
        what = f"the tokenizer puts tokens {before} before a text and {after} after it"
        raise UnsupportedError(f"{what}, which a GGUF cannot say", where=folder)
    ends = sorted(end for end in end_tokens(folder, tokenizer) if 0 <= end < size)
    if not ends:
        raise UnsupportedError("no end token is named, and llama.cpp would invent one", where=folder)
    end = last if last in ends else ends[0]
    rest = [other for other in ends if other != end and words.tokens[other] not in _ENDS]
    if len(rest) > 2:
        what = f"a GGUF cannot name that many end tokens: {[words.tokens[other] for other in ends]}"
        raise UnsupportedError(what, where=folder)
    for add, number in zip((writer.add_eot_token_id, writer.add_eom_token_id), rest, strict=False):
        add(number)
    writer.add_eos_token_id(end)
    for add, number in (
        (writer.add_bos_token_id, first),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if number is not None and 0 <= number < size:
            add(number)
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))


def _start(full: list[int], plain: list[int]) -> int:
    """Where a text's tokens begin among those with special tokens."""
    places = (n for n in range(len(full) - len(plain) + 1) if full[n : n + len(plain)] == plain)
    return next(places, len(full))


def _add_template(writer: GGUFWriter, template: str | dict[str, str] | None) -> None:
    named = {"default": template} if isinstance(template, str) else template or {}
    for name in sorted(named):
        key = "tokenizer.chat_template" if name == "default" else f"tokenizer.chat_template.{name}"
        writer.add_string(key, named[name])
    if others := sorted(named.keys() - {"default"}):
        writer.add_array("tokenizer.chat_templates", others)
