"""Text from a model: streamed, drawn, and in a conversation."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mkaq.generate.choice import chooser, likeliest
from mkaq.generate.pace import Pace
from mkaq.generate.sampling import Sampling
from mkaq.generate.stream import stream
from tests.runs import Mkaq, one_message

pytestmark = pytest.mark.usefixtures("one_thread")
LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0])
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]"


def drawn(sampling: Sampling, count: int = 400) -> list[int]:
    choose = chooser(sampling)
    return [choose(LOGITS) for _ in range(count)]


def test_what_is_drawn() -> None:
    assert likeliest(LOGITS) == 1 and drawn(Sampling(), 3) == [1, 1, 1]
    assert set(drawn(Sampling(temperature=5.0))) == {0, 1, 2, 3}
    assert set(drawn(Sampling(temperature=5.0, top_k=2))) == {1, 2}
    assert set(drawn(Sampling(temperature=1.0, top_p=0.8))) == {1, 2}
    assert set(drawn(Sampling(temperature=1.0, min_p=0.3))) == {1, 2}
    share = drawn(Sampling(temperature=1.0), 4000).count(1) / 4000
    assert share == pytest.approx(float(LOGITS.softmax(-1)[1]), abs=0.03)
    assert drawn(Sampling(temperature=1.0, seed=1)) == drawn(Sampling(temperature=1.0, seed=1))
    assert drawn(Sampling(temperature=1.0, seed=1)) != drawn(Sampling(temperature=1.0, seed=2))


class Counts:
    """A model whose likeliest token is one more than the last."""

    def __call__(self, input_ids: torch.Tensor, **options: Any) -> "Counts":
        self.logits = torch.nn.functional.one_hot(input_ids[:, -1:] + 1, 10).float()
        self.past_key_values = None
        return self


def test_tokens_come_one_by_one_until_an_end_or_the_limit() -> None:
    ids, pace = torch.tensor([[1, 2]]), Pace()
    assert list(stream(Counts(), ids, 3, set())) == [3, 4, 5]
    assert list(stream(Counts(), ids, 9, {6}, pace=pace)) == [3, 4, 5]
    assert (pace.prompt_tokens, pace.tokens) == (2, 3)
    assert "2 tokens read" in pace.describe() and "3 written" in pace.describe()
    assert next(stream(Counts(), ids, 9, set())) == 3


def test_generate_draws_with_a_seed_and_tells_its_speed(tiny: Path, mkaq: Mkaq) -> None:
    def text(*options: object) -> str:
        outcome = mkaq("generate", tiny, "To be", "--max-new-tokens", 8, *options)
        assert outcome.code == 0 and "8 written" in outcome.err and "tokens/s" in outcome.err
        return outcome.out

    greedy, hot = text(), ("--temperature", 3.0, "--seed", 1)
    assert text("--temperature", 3.0, "--top-k", 1) == greedy
    assert text(*hot) == text(*hot) != greedy
    assert text(*hot) != text("--temperature", 3.0, "--seed", 2)


@pytest.mark.parametrize("option", [("--temperature", -1), ("--top-p", 0), ("--min-p", 2), ("--top-k", -1)])
def test_what_cannot_be_drawn_is_refused(option: tuple[str, float], tiny: Path, mkaq: Mkaq) -> None:
    one_message(mkaq("generate", tiny, "To be", *option), 2, option[0])


@pytest.fixture
def talker(tiny: Path, tmp_path: Path) -> Path:
    """A model with a chat template."""
    folder = shutil.copytree(tiny, tmp_path / "talker")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_chat_answers_each_line_in_the_models_template(
    talker: Path, mkaq: Mkaq, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\nAnd you?\n"))
    inner = "mkaq.generate.in_torch.stream"
    monkeypatch.setattr(inner, lambda model, ids, *rest: seen.append(ids) or iter([70, 71]))
    outcome = mkaq("chat", talker, "--system", "Be brief.")
    assert outcome.code == 0 and len(outcome.out.splitlines()) == 2, outcome.err
    from mkaq.calibrate.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(talker)
    answer = tokenizer.decode([70, 71])
    first = "[system]Be brief.\n[user]Hello\n[assistant]"
    assert tokenizer.decode(seen[0][0]) == first
    assert tokenizer.decode(seen[1][0]) == f"{first}{answer}\n[user]And you?\n[assistant]"


def test_a_message_that_fails_does_not_end_a_chat(
    talker: Path, mkaq: Mkaq, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"Hello\n{'word ' * 9000}\n\udcff\nAnd you?\n"))
    outcome = mkaq("chat", talker, "--max-new-tokens", 2)
    assert outcome.code == 2 and len(outcome.out.splitlines()) == 2
    assert "do not fit into the model's context" in outcome.err and "is not UTF-8" in outcome.err
    assert outcome.err.count("mkaq: ") == 2


def test_chat_needs_a_template(tiny: Path, mkaq: Mkaq) -> None:
    one_message(mkaq("chat", tiny), 2, "no chat template", "mkaq generate")


def test_a_template_that_fails_is_one_error(
    talker: Path, mkaq: Mkaq, monkeypatch: pytest.MonkeyPatch
) -> None:
    (talker / "chat_template.jinja").write_text("{{ raise_exception('no such role') }}")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    one_message(mkaq("chat", talker), 2, "no such role")


def test_json_is_the_streamed_text(tiny: Path, mkaq: Mkaq) -> None:
    command = ("generate", tiny, "To be", "--max-new-tokens", 6)
    told = json.loads(mkaq(*command, "--json").out)
    assert mkaq(*command).out == f"To be{told['text']}\n" and told["tokens"] == 6


def test_context_is_a_limit(tiny: Path, mkaq: Mkaq) -> None:
    done = mkaq("generate", tiny, "To be", "--max-new-tokens", 1000, "--json")
    told = json.loads(done.out)
    assert told["context_full"] and told["prompt_tokens"] + told["tokens"] == 256
    one_message(mkaq("generate", tiny, "word " * 300), 2, "context of 256", "shorten")


def test_a_filter_without_a_temperature_is_refused(tiny: Path, mkaq: Mkaq) -> None:
    one_message(mkaq("generate", tiny, "To be", "--top-k", 3), 2, "--temperature")
    one_message(mkaq("generate", tiny, "To be", "--temperature", 1, "--seed", 2**32), 2, "--seed")


def test_memory_is_told(tiny: Path, mkaq: Mkaq) -> None:
    assert "B of memory" in mkaq("generate", tiny, "To be", "--max-new-tokens", 1).err
