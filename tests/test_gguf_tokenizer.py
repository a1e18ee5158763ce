"""The tokenizer in a GGUF file; what llama.cpp would read differently is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as library
import pytest

from mkaq.checkpoint.validate import open_checkpoint
from mkaq.errors import CheckpointError, UnsupportedError
from mkaq.export import gguf
from mkaq.export.settings import Settings
from tests.tiny import edit_config, make_model
from tests.tiny_tokenizers import GPT2, RULES, split, use_rules, use_sentencepiece

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model for each kind of tokenizer. Not to be changed."""
    folder = tmp_path_factory.mktemp("models")
    result = {name: make_model(folder / name, layers=1) for name in (*RULES, "pieces", "no model", "phi3")}
    for name in RULES:
        use_rules(result[name], name)
    use_sentencepiece(result["pieces"])
    use_sentencepiece(result["no model"], own=False)
    use_sentencepiece(result["phi3"], phi3=True)
    return result


def written(model: Path, folder: Path, name: str = "tiny") -> dict[str, Any]:
    """The metadata of a model's GGUF file."""
    folder.mkdir()
    gguf.write(open_checkpoint(model), folder, Settings(name))
    fields = library.GGUFReader(folder / f"{name}.gguf").fields
    return {key.removeprefix("tokenizer.ggml."): field.contents() for key, field in fields.items()}


def copied(model: Path, folder: Path, change: Change = lambda data: None) -> Path:
    shutil.copytree(model, folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    change(data)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize("name", RULES)
def test_rules_have_their_name(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    found = written(models[name], tmp_path / "out")
    assert found["model"] == "gpt2" and found["pre"] == name and not found["add_bos_token"]
    assert found["tokens"][4001:4003] == ["<|im_end|>", "<tool>"] and found["eos_token_id"] == 1
    assert found["token_type"][4000:4004] == [3, 3, 4, 1] and found["bos_token_id"] == 0
    pairs = json.loads((models[name] / "tokenizer.json").read_text())["model"]["merges"]
    assert found["merges"] == [" ".join(pair) for pair in pairs]


@pytest.mark.parametrize("name", ["pieces", "no model"])
def test_sentencepiece_has_scores(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    found = written(models[name], tmp_path / "out")
    assert found["model"] == "llama" and found["add_space_prefix"] and found["add_bos_token"]
    assert found["token_type"][:4] == [2, 3, 3, 6] and found["tokens"][3] == "<0x00>"
    assert found["token_type"][2000:] == [5] * 2096 and found["tokens"][4095] == "[PAD4095]"
    score = dict(zip(found["tokens"], found["scores"], strict=True))
    pairs = json.loads((models[name] / "tokenizer.json").read_text())["model"]["merges"]
    order = [score["".join(pair)] for pair in pairs]
    assert order == sorted(order, reverse=True) and order[0] > order[-1]


def test_only_a_model_whose_tokens_strip_is_named_phi3(models: dict[str, Path], tmp_path: Path) -> None:
    assert written(models["phi3"], tmp_path / "a", "tiny")["general.name"] == "tiny (phi-3)"
    assert written(models["phi3"], tmp_path / "b", "Phi-3-mini")["general.name"] == "Phi-3-mini"
    assert written(models["pieces"], tmp_path / "c", "Phi-3-mini")["general.name"] == "Phi 3-mini"


def test_chat_templates_and_end_tokens(models: dict[str, Path], tmp_path: Path) -> None:
    model = copied(models["gpt-2"], tmp_path / "model")
    (model / "chat_template.jinja").write_text("plain {{ messages }}")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("tools {{ messages }}")
    edit_config(model, eos_token_id=[1, 4001, 7, 9])
    (model / "generation_config.json").write_text("{}")
    found = written(model, tmp_path / "out")
    assert found["tokenizer.chat_template"] == "plain {{ messages }}"
    assert found["tokenizer.chat_template.tools"] == "tools {{ messages }}"
    assert found["tokenizer.chat_templates"] == ["tools"]
    assert [found[f"{key}_token_id"] for key in ("eos", "eot", "eom")] == [1, 7, 9]
    edit_config(model, eos_token_id=[1, 7, 9, 11])
    with pytest.raises(UnsupportedError, match="that many end tokens"):
        written(model, tmp_path / "again")


def test_no_end_token_at_all_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    model = copied(models["gpt-2"], tmp_path / "model")
    (model / "generation_config.json").unlink()
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    edit_config(model, eos_token_id=[])
    with pytest.raises(UnsupportedError, match="no end token"):
        written(model, tmp_path / "out")


def flag(**flags: bool) -> Change:
    return lambda data: data["added_tokens"][-1].update(flags)


def normalize(normalizer: Any, before: Any = None) -> Change:
    return lambda data: data.update({"normalizer": normalizer, "pre_tokenizer": before})


def drop_a_merge(data: dict[str, Any]) -> None:
    data["model"]["merges"].pop(50)


def part_the_merges(data: dict[str, Any]) -> None:
    merges = data["model"]["merges"]
    wholes = ["".join(pair) for pair in merges]
    twice = next(n for n, whole in enumerate(wholes) if wholes.count(whole) > 1)
    merges.append(merges.pop(twice))


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
REFUSED: dict[str, tuple[str, Change, str]] = {
    "an unknown rule": (
        "gpt-2",
        lambda data: data["pre_tokenizer"]["pretokenizers"].insert(0, split("[a-c]")),
        "none of gpt-2, smollm",
    ),
    "another step": (
        "gpt-2",
        lambda data: data["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Whitespace"}),
        "Whitespace",
    ),
    "a space in front": (
        "gpt-2",
        lambda data: data.update({"pre_tokenizer": GPT2 | {"add_prefix_space": True}}),
        "add_prefix_space",
    ),
    "words that skip the merges": (
        "gpt-2",
        lambda data: data["model"].update({"ignore_merges": True}),
        "none of",
    ),
    "a normalizer": ("gpt-2", lambda data: data.update({"normalizer": {"type": "Lowercase"}}), "Lowercase"),
    "lstrip": ("gpt-2", flag(lstrip=True), "lstrip"),
    "rstrip": ("gpt-2", flag(rstrip=True), "rstrip"),
    "spaces of another kind": ("pieces", normalize(None, METASPACE), "Metaspace"),
    "a normalized token": ("pieces", flag(normalized=True), "normalized"),
    "a merge that is missing": ("no model", drop_a_merge, "there is no merge"),
    "merges in no order of tokens": ("no model", part_the_merges, "lie apart"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_would_split_differently_is_refused(
    models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    kind, change, reason = REFUSED[name]
    model = copied(models[kind], tmp_path / "model", change)
    with pytest.raises(UnsupportedError, match=reason):
        written(model, tmp_path / "out")


def test_files_that_are_missing_or_wrong(models: dict[str, Path], tmp_path: Path) -> None:
    other = copied(models["pieces"], tmp_path / "other")
    (other / "tokenizer.model").write_bytes(b"not a vocabulary")
    with pytest.raises(CheckpointError, match="tokenizer"):
        written(other, tmp_path / "a")
    only = copied(models["pieces"], tmp_path / "only")
    (only / "tokenizer.json").unlink()
    (only / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(UnsupportedError, match=r"no tokenizer\.json"):
        written(only, tmp_path / "b")
