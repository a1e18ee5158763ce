"""`mkaq generate` stops at every end token that the checkpoint names; what is no token is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mkaq.calibrate.tokenizer import load_tokenizer
from mkaq.checkpoint.end_tokens import end_tokens
from mkaq.errors import CheckpointError
from tests.runs import Mkaq, one_message
from tests.tiny import edit_config

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = ("The value of the", "--max-new-tokens", 8, "--json")


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny, tmp_path / "model")


def name(folder: Path, tokens: Any) -> None:
    """Writes a generation_config.json that names end tokens."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokens}))


def test_generation_stops_at_any_of_them(model: Path, mkaq: Mkaq) -> None:
    tokenizer = load_tokenizer(model)
    name(model, 1)
    text = json.loads(mkaq("generate", model, *PROMPT).out)
    ids = tokenizer(text["text"], add_special_tokens=False)["input_ids"]
    assert text["tokens"] == 8
    name(model, [1, ids[0]])
    shorter = json.loads(mkaq("generate", model, *PROMPT).out)
    assert (shorter["text"], shorter["tokens"]) == ("", 0)
    name(model, 1)
    edit_config(model, eos_token_id=[1, ids[0]])
    assert json.loads(mkaq("generate", model, *PROMPT).out)["tokens"] == 0


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (7, {1, 7}),
        ([5, 7], {1, 5, 7}),
        (None, {1}),
        ([], {1}),
        (-1, {1, -1}),  # no token has it: it ends nothing
        (10**30, {1, 10**30}),
        (list(range(2, 10**5)), {1, *range(2, 10**5)}),
    ],
)
def test_all_places_count(tokens: Any, expected: set[int], model: Path) -> None:
    name(model, tokens)
    assert end_tokens(model, load_tokenizer(model)) == expected
    (model / "generation_config.json").unlink()
    assert end_tokens(model, load_tokenizer(model)) == {1}


@pytest.mark.parametrize("tokens", ["</s>", ["</s>"], 1.5, True, {"id": 1}, [[1]], [None], ["x" * 10**6]])
def test_what_is_no_token_is_refused(tokens: Any, model: Path, mkaq: Mkaq) -> None:
    name(model, tokens)
    with pytest.raises(CheckpointError):
        end_tokens(model, load_tokenizer(model))
    outcome = mkaq("generate", model, *PROMPT)
    one_message(outcome, 4, "generation_config.json", "neither a token id nor a list of them")
    assert len(outcome.err) < 1000
