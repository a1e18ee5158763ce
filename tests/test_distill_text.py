"""What a distillation reads: text, conversations of which the answers count, and what the source writes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mkaq.calibrate.tokenizer import load_tokenizer
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.distill.chat import chat_rows, conversations, encoded
from mkaq.distill.own_words import SourceAuthor
from mkaq.distill.text import HELD_OUT, Text, Wanted, build_text
from mkaq.errors import UsageError
from mkaq.progress import Progress
from mkaq.walk.whole_model import whole_model

pytestmark = pytest.mark.usefixtures("one_thread")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = [
    {"role": "user", "content": "What is a dictionary?"},
    {"role": "assistant", "content": "A mapping."},
    {"role": "user", "content": "And a list?"},
    {"role": "assistant", "content": "A sequence."},
]


@pytest.fixture
def tokenizer(model: Path) -> Any:
    loaded = load_tokenizer(model)
    loaded.chat_template = TEMPLATE
    return loaded


def lines(path: Path, talks: Sequence[Any]) -> str:
    path.write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    return str(path)


def test_text_is_learned_held_out_and_put_in_random_phrases(
    text: Path, tokenizer: Any, tmp_path: Path
) -> None:
    made = build_text(Wanted("text", str(text), 40, 32, 0), None, tokenizer)
    assert made.train == 35 and made.own == range(35, 40) and made.other == range(40, 45)
    assert made.tokens.shape == (45, 32) and bool(made.learned.all())
    assert sorted(set(made.tokens[40].tolist())) != sorted(set(made.tokens[0].tolist()))
    assert set(made.tokens[40].tolist()) <= set(made.tokens[35].tolist())  # the same tokens
    made.save(tmp_path / "text")
    again = Text.load(tmp_path / "text")
    assert torch.equal(again.tokens, made.tokens) and again.train == made.train
    assert torch.equal(again.learned, made.learned)
    other = build_text(Wanted("text", str(text), 40, 32, 1), None, tokenizer)
    assert not torch.equal(other.tokens, made.tokens)


def test_no_more_is_held_out_than_measures_well() -> None:
    assert Wanted("text", None, 16, 32, 0).held_out == 2
    assert Wanted("text", None, 100_000, 64, 0).held_out == HELD_OUT // 64


def test_a_gate_is_other_text(text: Path, tokenizer: Any, tmp_path: Path) -> None:
    gate = tmp_path / "gate.txt"
    gate.write_text("zebra " * 4000)
    made = build_text(Wanted("text", str(text), 40, 32, 0), str(gate), tokenizer)
    assert "zebra" in tokenizer.decode(made.tokens[-1]) and len(made.other) == 5
    gate.write_text("zebra")
    with pytest.raises(UsageError, match="too little text") as error:
        build_text(Wanted("text", str(text), 40, 32, 0), str(gate), tokenizer)
    assert error.value.where == "recover.gate"


def test_the_answers_of_a_conversation_count(tokenizer: Any) -> None:
    ids, spoken = encoded(TALK, tokenizer)
    assert tokenizer.decode(ids).count("<user>") == 2
    said = [token for token, own in zip(ids, spoken, strict=True) if own]
    assert tokenizer.decode(said) == "A mapping.\nA sequence.\n"


def test_conversations_are_packed_and_predictions_count(tokenizer: Any, tmp_path: Path) -> None:
    path = lines(tmp_path / "talks.jsonl", [TALK] * 30)
    made = build_text(Wanted("jsonl", path, 16, 24, 0), None, tokenizer)
    assert made.tokens.shape == (18, 24)
    stream, counts = made.tokens[:16].flatten(), made.learned[:16].flatten()
    said = tokenizer.decode(stream[1:][counts[:-1]])  # a prediction is of the next token
    assert said.startswith("A mapping.\nA sequence.\nA mapping.") and 0.1 < counts.float().mean() < 0.9
    assert bool(made.learned[16:].all())


def test_what_follows_the_last_answer_is_left_out(tmp_path: Path) -> None:
    path = lines(tmp_path / "talks.jsonl", [[*TALK, {"role": "user", "content": "Why?"}]])
    assert conversations(path, 0) == [TALK]


@pytest.mark.parametrize(
    "messages",
    [None, [], "x", [{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": 3}], [7]],
)
def test_messages_that_are_none_are_named(messages: Any, tmp_path: Path) -> None:
    path = lines(tmp_path / "talks.jsonl", [TALK, messages])
    with pytest.raises(UsageError, match="line 2 has no `messages`"):
        conversations(path, 0)


def test_without_a_chat_template_conversations_are_refused(model: Path) -> None:
    with pytest.raises(UsageError, match="no chat template"):
        encoded(TALK, load_tokenizer(model))


def test_a_template_that_fails_or_rewrites_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UsageError, match="the chat template fails"):
        encoded(TALK, tokenizer)
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(UsageError, match="writes an answer otherwise"):
        encoded(TALK, tokenizer)


def test_too_few_conversations_say_how_many_there_are(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="too little text") as error:
        chat_rows([TALK], tokenizer, 16, 24)
    assert "recover.text.num_samples" in str(error.value)


@pytest.fixture
def author(model: Path, tokenizer: Any) -> SourceAuthor:
    whole = whole_model(open_checkpoint(model), torch.device("cpu"), torch.float32)
    return SourceAuthor(whole, tokenizer, [0], 6, 3, Progress(quiet=True))


def test_the_source_continues_text(author: SourceAuthor, text: Path, tokenizer: Any) -> None:
    wanted = Wanted("text", str(text), 20, 32, 0)
    given, made = (build_text(wanted, None, tokenizer, each) for each in (None, author))
    assert torch.equal(given.tokens[:20, :8], made.tokens[:20, :8])
    assert made.tokens.shape == given.tokens.shape and made.tokens.dtype == torch.int32
    assert (given.tokens[:20, 8:] == made.tokens[:20, 8:]).float().mean() < 0.1
    assert torch.equal(made.tokens, build_text(wanted, None, tokenizer, author).tokens)


def test_the_source_answers(author: SourceAuthor) -> None:
    state = torch.get_rng_state()
    talks = list(author.answered([TALK, TALK[:2]]))
    assert [talk[:-1] for talk in talks] == [TALK[:-1], TALK[:1]]
    assert all(talk[-1]["role"] == "assistant" and talk[-1]["content"] != "A mapping." for talk in talks)
    assert talks == list(author.answered([TALK, TALK[:2]]))
    assert torch.equal(torch.get_rng_state(), state)
