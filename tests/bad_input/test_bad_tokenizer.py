"""Models whose tokenizers are missing, damaged, or do not belong to them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bad_input.after import added
from tests.bad_input.damage import EMBED, Damage, change_tensors
from tests.runs import Mkaq, one_message
from tests.tiny import edit_config


def lose_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def fewer_tokens(folder: Path) -> None:
    """A model that knows 100 tokens, with a tokenizer that gives 4096."""
    change_tensors(lambda t: t.update({n: t[n][:100].clone() for n in (EMBED, "lm_head.weight")}))(folder)
    edit_config(folder, vocab_size=100)


TOKENIZERS: dict[str, tuple[Damage, str]] = {
    "missing": (lose_tokenizer, "no usable tokenizer"),
    "no JSON": (lambda f: (f / "tokenizer.json").write_text("{"), "no usable tokenizer"),
    "config is no JSON": (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer_config.json"),
    "remote code": (
        lambda f: (f / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", null]}}'
        ),
        "remote code",
    ),
    "more tokens than the model": (fewer_tokens, "token"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
@pytest.mark.parametrize("evaluated", [False, True])
def test_tokenizer_that_cannot_be_used(
    case: str,
    evaluated: bool,
    broken: Callable[[Damage], Path],
    recipe: Callable[..., Path],
    mkaq: Mkaq,
    folder: Path,
    earlier: Path,
) -> None:
    damage, word = TOKENIZERS[case]
    path = broken(damage)
    sections = {} if evaluated else {"evaluate": None}
    outcome = mkaq("run", recipe(model={"path": str(path)}, **sections), "--output", folder)
    one_message(outcome, 4, str(path), word)
    assert added(folder, earlier) <= {"calibrate"}


def test_no_tokenizer_is_needed_where_no_text_is_read(
    broken: Callable[[Damage], Path], recipe: Callable[..., Path], mkaq: Mkaq, tmp_path: Path
) -> None:
    path = broken(lose_tokenizer)
    quantize = {"method": "bitsandbytes", "bits": 8}
    sections = {"calibration": None, "merge": None, "quantize": quantize, "evaluate": None}
    changed = recipe(model={"path": str(path)}, **sections)
    assert mkaq("run", changed, "--output", tmp_path / "new").code == 0
