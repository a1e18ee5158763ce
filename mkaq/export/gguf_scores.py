"""Scores that make llama.cpp merge as SentencePiece's BPE does.

llama.cpp joins the neighbours with the highest score, any two that make a token; tokenizer.json has a list of
the pairs that are joined.
"""

from collections.abc import Sequence
from pathlib import Path

from mkaq.errors import CheckpointError
from mkaq.export.gguf_splits import UnknownRule


def stored_scores(path: Path, tokens: Sequence[str], normal: Sequence[bool]) -> list[float]:
    """The scores in a tokenizer.model.

    Args:
        path: The file.
        tokens: Every token, by id.
        normal: Whether each is one that merges make; others get the lowest score.

    Raises:
        UnknownRule: If its tokens are others.
        CheckpointError: If it cannot be read.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        pieces = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        what = f"is no sentencepiece vocabulary: {str(error)[:100]}"
        raise CheckpointError(what, where=path) from None
    size = pieces.get_piece_size()
    for number, (token, plain) in enumerate(zip(tokens, normal, strict=True)):
        if plain and (number >= size or pieces.id_to_piece(number) != token):
            raise UnknownRule(f"token {number} is {token!r}, in tokenizer.model it is another")
    last = -float(len(tokens))
    return [float(pieces.get_score(n)) if plain else last for n, plain in enumerate(normal)]


def ordered_scores(
    merges: Sequence[tuple[str, str]], tokens: Sequence[str], normal: Sequence[bool]
) -> list[float]:
    """Scores with the order of a list of merges.

    Args:
        merges: Pairs, the first to be joined first.
        tokens: Every token, by id.
        normal: Whether each is one that merges make; others get the lowest score.

    Raises:
        UnknownRule: If no scores do the same as the list.
    """
    rank: dict[str, int] = {}
    previous = None
    for pair in merges:
        whole = "".join(pair)
        if whole != previous and rank.setdefault(whole, len(rank)) != len(rank) - 1:
            raise UnknownRule(f"the merges that make {whole!r} lie apart")
        previous = whole
    known, listed = {t for t, plain in zip(tokens, normal, strict=True) if plain}, set(merges)
    for token in known:
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair[0] in known and pair[1] in known and pair not in listed:
                raise UnknownRule(f"there is no merge of {pair[0]!r} and {pair[1]!r}, which make a token")
    last = -float(len(tokens))
    return [-float(rank[t]) if plain and t in rank else last for t, plain in zip(tokens, normal, strict=True)]
