"""Text as the world writes it: half surrogate pairs, byte order marks, NUL, names that are not UTF-8."""

import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mkaq.calibrate.text import documents, text_digest
from mkaq.console import escape_unencodable, print_json
from mkaq.errors import UsageError
from tests.runs import Mkaq, Outcome, one_message
from tests.tiny import edit_config

PLAIN = {"num_samples": 8, "max_seq_length": 32}
HALF = "half an emoji \ud83d, and the other half \ude00"
NOT_UTF8 = os.fsdecode(b"caf\xe9")


def read(dataset: Any, path: Path) -> list[str]:
    return documents(dataset, str(path), "calibrate")


def test_half_a_surrogate_pair_becomes_the_replacement_character(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in (HALF, "whole \U0001f600", "\ud83d")]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    replaced = "half an emoji \ufffd, and the other half \ufffd"
    assert read("jsonl", tmp_path / "x.jsonl") == [replaced, "whole \U0001f600", "\ufffd"]


def test_runs_read_such_text(recipe: Callable[..., Path], mkaq: Mkaq, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(
        "\n".join(json.dumps({"text": f"some words, a NUL \0 and {HALF} " * 60}) for _ in range(20))
    )
    section = {"dataset": "jsonl", "path": str(path), **PLAIN}
    changed = recipe(calibration=section, quantize=None, evaluate={"perplexity": dict(section)})
    outcome = mkaq("run", changed, "--output", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    options = ("--dataset", "jsonl", "--path", path, "--num-samples", 2, "--max-seq-length", 32)
    assert mkaq("eval", "builtin:tiny-llama", *options).code == 0


def test_config_with_half_a_surrogate_pair(
    model: Path, recipe: Callable[..., Path], mkaq: Mkaq, tmp_path: Path
) -> None:
    source = shutil.copytree(model, tmp_path / "model")
    edit_config(source, _name_or_path=HALF)
    outcome = mkaq("run", recipe(model={"path": str(source)}, evaluate=None), "--output", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "run/artifact/config.json").read_text())["_name_or_path"] == HALF
    assert mkaq("verify", tmp_path / "run/artifact").code == 0


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfwords")
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "words"}\r\n')
    assert read("text", tmp_path / "x.txt") == read("jsonl", tmp_path / "x.jsonl") == ["words"]


@pytest.mark.parametrize("line", ["[" * 100_000, '{"text": 1}', '{"text": ' + "1" * 5000 + "}", "\ufeff{}"])
def test_line_that_is_no_text_is_named(
    line: str, recipe: Callable[..., Path], mkaq: Mkaq, tmp_path: Path
) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "words"}\n' + line)
    section = {"dataset": "jsonl", "path": str(tmp_path / "x.jsonl"), **PLAIN}
    outcome = mkaq("run", recipe(calibration=section, evaluate=None), "--output", tmp_path / "run")
    one_message(outcome, 2, "x.jsonl", "line 2")


def test_archive_that_asks_for_gigabytes(tmp_path: Path) -> None:
    """A header of 13 bytes: a dictionary of 4 GiB, and an unknown length."""
    path = tmp_path / "x.txt.xz"
    path.write_bytes(b"\x5d" + b"\xff" * 12)
    with pytest.raises(UsageError, match=r"x\.txt\.xz: cannot be read as UTF-8 text: Memory usage limit"):
        read("text", path)


def test_files_may_have_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = tmp_path / NOT_UTF8
    folder.mkdir()
    (folder / f"{NOT_UTF8}.txt").write_text("words")
    assert documents("text", str(folder), "calibrate") == ["words"]
    assert len(text_digest("text", str(folder))) == 64


def test_folder_whose_name_is_not_utf8(
    recipe: Callable[..., Path], model: Path, mkaq: Mkaq, tmp_path: Path
) -> None:
    """safetensors opens no file there; it is said before anything is written."""
    folder = tmp_path / NOT_UTF8
    for command in (("plan", recipe()), ("run", recipe())):
        one_message(mkaq(*command, "--output", folder), 2, "caf\\udce9", "not UTF-8")
    assert not folder.exists()
    shutil.copytree(model, folder)
    for command in (("eval", folder), ("generate", folder, "x"), ("verify", folder)):
        one_message(mkaq(*command), 2, "caf\\udce9", "not UTF-8")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_output_is_escaped_where_it_cannot_be_encoded(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    escape_unencodable()
    said = {"path": NOT_UTF8, "text": "± \U0001f600"}
    print_json(said)
    print("34.40 ± 1.85", NOT_UTF8)
    sys.stdout.flush()
    text = raw.getvalue().decode(encoding)
    assert json.loads(text[: text.index("}") + 1]) == said
    assert "34.40 " in text and "caf\\udce9" in text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('name: "x\\ud83d"\nmodel: {path: m}', ("line 2, name", "is no text")),
        ('name: x\nmodel: {path: "m\\ud83d"}', ("line 3, model.path", "is no text")),
        ('name: x\nmodel: {path: "m\\0"}', ("no such model folder",)),
        ('name: x\nmodel: {path: m, "k\\ud83d": 1}', ("model", "is no text")),
        ("name: x\nmodel: {path: m\0}", ("is not YAML",)),
    ],
)
def test_recipe_with_strange_text(
    line: str, words: tuple[str, ...], tmp_path: Path, refused: Callable[..., Outcome]
) -> None:
    (tmp_path / "r.yaml").write_text(f"version: 1\n{line}\nquantize: {{method: bitsandbytes}}\n")
    refused(2, *words, path=tmp_path / "r.yaml")


@pytest.mark.parametrize(
    "key", ["model.path", "name", "calibration.path", "export.shard_size", "model.revision"]
)
def test_setting_that_is_not_utf8(key: str, refused: Callable[..., Outcome]) -> None:
    refused(2, f"--set {key}", "is no text", arguments=("--set", f"{key}={NOT_UTF8}"))


def test_recipe_with_a_byte_order_mark(recipe: Callable[..., Path], mkaq: Mkaq) -> None:
    path = recipe()
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert mkaq("plan", path).code == 0


def test_prompt_that_is_not_utf8(model: Path, mkaq: Mkaq) -> None:
    one_message(mkaq("generate", model, NOT_UTF8), 2, "PROMPT", "not UTF-8")
