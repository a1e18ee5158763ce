"""Tokenizers in their several files, and what is said when one cannot be read."""

import base64
import io
import json
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import sentencepiece

from mkaq.calibrate import tokenizer as module
from mkaq.calibrate.tokenizer import load_tokenizer
from mkaq.errors import CheckpointError
from tests.runs import Mkaq
from tests.tiny import make_model

SETTINGS = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}
TIKTOKEN = "".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)).encode()
TEXT = "The value of the expression is the value of its last operand."


@pytest.fixture(scope="module")
def vocabulary() -> bytes:
    """A SentencePiece model with Llama's settings."""
    output = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(topics[name] for name in sorted(topics)[:20]).splitlines()),
        model_writer=output,
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return output.getvalue()


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A model whose tokenizer has its settings and no vocabulary."""
    folder = make_model(tmp_path / "model", layers=3)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS | {"add_bos_token": True}))
    return folder


def test_sentencepiece_alone(bare: Path, vocabulary: bytes, mkaq: Mkaq) -> None:
    (bare / "tokenizer.model").write_bytes(vocabulary)
    own = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
    found = load_tokenizer(bare)
    assert found(TEXT)["input_ids"] == [own.bos_id(), *own.encode(TEXT)]
    outcome = mkaq("eval", bare, "--num-samples", 2, "--max-seq-length", 32)
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize(
    ("missing", "named"),
    [(["sentencepiece"], "sentencepiece"), (["google.protobuf"], "protobuf"), (["google"], "protobuf")],
)
def test_what_sentencepiece_needs_is_named(
    missing: list[str], named: str, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries say `pip install tiktoken` here, which does not help."""

    def find(name: str) -> object:
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(name)
        return None if name in missing else name

    (bare / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")  # that no library can read
    monkeypatch.setattr(module, "find_spec", find)
    with pytest.raises(CheckpointError, match="is a sentencepiece vocabulary") as error:
        load_tokenizer(bare)
    assert str(error.value).endswith(f"fix: pip install {named}") and "tiktoken" not in str(error.value)


def test_tiktoken_is_named_where_it_is_what_is_missing(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bare / "tokenizer.model").write_bytes(TIKTOKEN)
    if find_spec("tiktoken") is None:
        with pytest.raises(CheckpointError, match="is a tiktoken vocabulary") as error:
            load_tokenizer(bare)
        assert str(error.value).endswith("fix: pip install tiktoken")
    else:
        assert load_tokenizer(bare)(TEXT)["input_ids"]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "there is no tokenizer.json and no tokenizer.model"),
        ({"tokenizer.model": b"garbage"}, "tokenizer.model is no sentencepiece vocabulary that can be read"),
        ({"tokenizer.model": b""}, "tokenizer.model is no sentencepiece vocabulary that can be read"),
        ({"tokenizer.json": b"{"}, "no usable tokenizer"),
        ({"tekken.json": b"{"}, "no usable tokenizer"),
    ],
)
def test_vocabulary_that_is_missing_or_damaged(files: dict[str, bytes], words: str, bare: Path) -> None:
    """Some classes come without an error, and with an empty vocabulary."""
    for name, data in files.items():
        (bare / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=words) as error:
        load_tokenizer(bare)
    assert "tiktoken" not in str(error.value)
    assert "fix: get the tokenizer's files again" in str(error.value)
