"""Text sources and the tokens made of them. MKAQ_TEST_DATA names a folder of larger texts, if any."""

import ast
import gzip
import json
import lzma
import os
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from mkaq.calibrate import text
from mkaq.calibrate.text import Split, builtin_documents, documents, text_digest
from mkaq.calibrate.tokenizer import load_tokenizer
from mkaq.calibrate.tokens import calibration_tokens, evaluation_sequences
from mkaq.checkpoint.resolve import BUILTIN
from mkaq.errors import UsageError
from mkaq.stages.base import Dataset

PROSE = "\n".join(f"Line {i}: the quick brown fox jumps over {i * 37 % 101} lazy dogs." for i in range(400))


@pytest.fixture(scope="module", params=["plain", "bos"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """The built-in tokenizer, and one that puts BOS before every text."""
    loaded = load_tokenizer(BUILTIN["builtin:tiny-llama"])
    if request.param == "bos":
        start = TemplateProcessing(single=f"{loaded.bos_token} $A", special_tokens=[(loaded.bos_token, 0)])
        loaded.backend_tokenizer.post_processor = start
    assert tokenizer_start(loaded) == ([0] if request.param == "bos" else [])
    return loaded


def tokenizer_start(tokenizer: Any) -> list[int]:
    return list(tokenizer("a")["input_ids"][:-1])


@pytest.fixture(scope="module")
def larger_texts() -> Path:
    folder = os.environ.get("MKAQ_TEST_DATA")
    if not folder or not Path(folder, "wikitext2_valid.txt.xz").is_file():
        pytest.skip("set MKAQ_TEST_DATA to a folder with wikitext2_valid.txt.xz")
    return Path(folder)


def read(dataset: Dataset, path: Path, split: Split = "calibrate") -> list[str]:
    return documents(dataset, str(path), split)


def mmlu(folder: Path) -> Path:
    """A small MMLU, with the commas, quotes and line breaks that the real one has."""
    for kind in ("dev", "test"):
        (folder / kind).mkdir(parents=True)
        for subject in ("abstract_algebra", "world_religions"):
            row = f'"{kind} of {subject}, ""quoted""\nand broken",first,"2, two",third,4,C\n'
            (folder / kind / f"{subject}_{kind}.csv").write_text(row + f"Another {kind}?,w,x,y,z,A\n")
    return folder


def test_text_is_a_file_or_all_text_files_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.md").write_text("third, ünïcode")
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"first"))
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    assert read("text", tmp_path) == ["first", "second", "third, ünïcode"]
    assert read("text", tmp_path / "b.txt", "evaluate") == ["second"]


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_compressed_files_are_read_and_damaged_ones_named(tmp_path: Path, suffix: str, compress: Any) -> None:
    path = tmp_path / f"text.txt{suffix}"
    path.write_bytes(compress("naïve text".encode()))
    assert read("text", path) == read("text", tmp_path) == ["naïve text"]
    path.write_bytes(compress(b"text")[:-6])
    with pytest.raises(UsageError, match=r"text\.txt.*cannot be read"):
        read("text", path)
    path.write_bytes(compress(b"\xff\xfe"))
    with pytest.raises(UsageError, match="cannot be read as UTF-8"):
        read("text", path)


def test_gz_with_a_damaged_stream_is_named(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(PROSE.encode()))
    data[10] ^= 0xFF  # the first byte after the header
    (tmp_path / "text.txt.gz").write_bytes(data)
    with pytest.raises(UsageError, match="cannot be read"):
        read("text", tmp_path / "text.txt.gz")


def test_jsonl_is_one_text_a_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "one\\ntwo", "id": 1}\n\n{"text": "  "}\n{"text": "three"}\n')
    assert read("jsonl", path) == ["one\ntwo", "three"]
    (tmp_path / "more.jsonl.gz").write_bytes(gzip.compress(b'{"text": "four"}'))
    assert read("jsonl", tmp_path) == ["one\ntwo", "three", "four"]


@pytest.mark.parametrize("line", ["not JSON", '{"content": "x"}', '["text"]', '{"text": 5}'])
def test_jsonl_names_the_line_that_is_wrong(tmp_path: Path, line: str) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UsageError, match=r"data.jsonl: line 2 is not"):
        read("jsonl", tmp_path / "data.jsonl")


def test_jsonl_texts_may_hold_unicode_line_separators(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "one\u2028two\x85"}, ensure_ascii=False))
    assert read("jsonl", tmp_path / "data.jsonl") == ["one\u2028two\x85"]


@pytest.mark.parametrize("names", [("wiki.{}.raw",), ("wiki.{}.tokens",), ("wikitext2_{}.txt.xz",)])
def test_wikitext2_trains_on_train_and_tests_on_test(tmp_path: Path, names: tuple[str]) -> None:
    for split in ("train", "valid", "test"):
        text = f"words of {split}".encode()
        name = names[0].format(split)
        (tmp_path / name).write_bytes(lzma.compress(text) if name.endswith(".xz") else text)
    assert read("wikitext2", tmp_path) == ["words of train"]
    assert read("wikitext2", tmp_path, "evaluate") == ["words of test"]
    (tmp_path / names[0].format("test")).unlink()
    assert read("wikitext2", tmp_path, "evaluate") == ["words of valid"]
    (tmp_path / names[0].format("valid")).unlink()
    with pytest.raises(UsageError, match=r"no wiki.test.raw"):
        read("wikitext2", tmp_path, "evaluate")


def test_wikitext2_never_calibrates_on_test(tmp_path: Path) -> None:
    (tmp_path / "wiki.test.raw").write_text("words")
    with pytest.raises(UsageError, match=r"no wiki.train.raw"):
        read("wikitext2", tmp_path)


@pytest.mark.parametrize("below", ["", "data"])
def test_mmlu_calibrates_on_dev_and_evaluates_on_test(tmp_path: Path, below: str) -> None:
    mmlu(tmp_path / below)
    for split, kind, other in (("calibrate", "dev", "test"), ("evaluate", "test", "dev")):
        texts = read("mmlu", tmp_path, split)  # type: ignore[arg-type]
        assert len(texts) == 2 and not any(other in text for text in texts)
        assert texts[0].startswith(
            "The following are multiple choice questions (with answers) about abstract a"
        )
        assert (
            f'{kind} of abstract_algebra, "quoted"\nand broken\nA. first\nB. 2, two\nC. third\n' in texts[0]
        )
        assert texts[0].count("\nAnswer: C") == texts[0].count("\nAnswer: A") == 1


def test_mmlu_without_dev_is_refused_and_a_bad_row_named(tmp_path: Path) -> None:
    mmlu(tmp_path)
    bad = tmp_path / "dev" / "abstract_algebra_dev.csv"
    bad.write_text(bad.read_text() + "question,a,b,c,d,E\n")
    with pytest.raises(UsageError, match=r"abstract_algebra_dev.csv: row 3 is not"):
        read("mmlu", tmp_path)
    (tmp_path / "dev").rename(tmp_path / "other")
    with pytest.raises(UsageError, match="no data/dev folder"):
        read("mmlu", tmp_path)


def test_mmlu_file_with_a_quote_that_never_closes_is_named(tmp_path: Path) -> None:
    mmlu(tmp_path)
    (tmp_path / "dev" / "abstract_algebra_dev.csv").write_text('"' + "question,a,b,c,d,A\n" * 10_000)
    with pytest.raises(UsageError, match=r"abstract_algebra_dev\.csv"):
        read("mmlu", tmp_path)


@pytest.mark.parametrize("dataset", ["text", "jsonl", "wikitext2", "mmlu"])
def test_missing_path_is_named(tmp_path: Path, dataset: Dataset) -> None:
    with pytest.raises(UsageError, match="nowhere: no such file"):
        read(dataset, tmp_path / "nowhere")


def test_file_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UsageError, match="holds no text"):
        read("text", tmp_path / "empty.txt")


def test_builtin_calibration_and_evaluation_share_no_document() -> None:
    calibrate, evaluate = documents("builtin", None, "calibrate"), documents("builtin", None, "evaluate")
    assert len(evaluate) > 20 and len(calibrate) > 3 * len(evaluate)
    assert not set(calibrate) & set(evaluate)
    assert set(calibrate) | set(evaluate) == set(builtin_documents())


def test_digest_follows_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    digests = [text_digest("text", str(tmp_path))]
    assert text_digest("text", str(tmp_path)) == digests[0]
    (tmp_path / "b.txt").write_text("2wo")
    digests.append(text_digest("text", str(tmp_path)))
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    digests.append(text_digest("text", str(tmp_path)))
    assert len(set(digests)) == 3
    with pytest.raises(UsageError, match="no such file"):
        text_digest("text", str(tmp_path / "nowhere"))


def test_digest_of_builtin_text_is_of_its_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    before = text_digest("builtin", None)
    monkeypatch.setattr(text, "builtin_documents", lambda: (*builtin_documents()[:-1], "other"))
    assert text_digest("builtin", None) != before


def test_definitions_are_found_wherever_statements_nest() -> None:
    source = """
        class A:
            if True:
                def a(self): return lambda: 0
            else:
                def b(self): pass
        try:
            def c(): pass
        except ValueError:
            for x in y:
                class B: pass
            else:
                def d(): pass
        else:
            while True:
                def e(): pass
        finally:
            with x as y:
                async def f():
                    def g(): pass
        match x:
            case 1:
                def h(): pass
        """
    tree = ast.parse(textwrap.dedent(source))
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    wanted = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    assert len(wanted) == 10
    assert [node for node in text.statements(tree) if isinstance(node, kinds)] == wanted


def test_samples_are_chosen_by_the_seed(tokenizer: Any) -> None:
    texts = [PROSE[start : start + 3000] for start in range(0, len(PROSE), 3000)]
    first, again, other = (calibration_tokens(texts, tokenizer, 6, 64, seed) for seed in (0, 0, 1))
    assert first.tolist() == again.tolist() != other.tolist()
    assert tuple(first.shape) == (6, 64)


def test_sequences_are_whole_text_after_what_the_tokenizer_puts_first(tokenizer: Any) -> None:
    start = tokenizer_start(tokenizer)
    rows = evaluation_sequences([PROSE], tokenizer, 50)
    assert {len(row) for row in rows[:-1]} == {50} and 1 < len(rows[-1]) <= 50
    assert all(row[: len(start)] == start for row in rows)
    body = [token for row in rows for token in row[len(start) :]]
    plain = tokenizer(PROSE, add_special_tokens=False)["input_ids"]
    assert body == plain[: len(body)] and len(plain) - len(body) <= 1
    assert evaluation_sequences([PROSE], tokenizer, 50, num_samples=3) == rows[:3]
    last_of_one = evaluation_sequences([PROSE], tokenizer, len(plain) - 1 + len(start))
    assert len(last_of_one) == len(start) + 1  # without BOS a sequence of one token predicts nothing
    samples = calibration_tokens([PROSE[:3000]], tokenizer, 2, 50, 0)
    assert samples.tolist() == [row[:50] for row in evaluation_sequences([PROSE[:3000]], tokenizer, 50, 2)]


def test_too_little_text_says_how_much_was_found(tokenizer: Any) -> None:
    found = len(tokenizer(PROSE[:2000], add_special_tokens=False)["input_ids"])
    with pytest.raises(
        UsageError, match=f"too little text: {found:,} tokens found, 500 samples of 64"
    ) as error:
        calibration_tokens([PROSE[:2000]], tokenizer, 500, 64, 0)
    fitting = int(re.findall(r"(\d+) or less", str(error.value))[0])
    assert len(calibration_tokens([PROSE[:2000]], tokenizer, fitting, 64, 0)) == fitting > 1
    with pytest.raises(UsageError, match="too little"):
        calibration_tokens([PROSE[:2000]], tokenizer, fitting + 1, 64, 0)
    with pytest.raises(UsageError, match=f"{found:,} tokens found"):
        evaluation_sequences([PROSE[:2000]], tokenizer, found + 5)


def test_larger_text_calibrates_and_evaluates(tokenizer: Any, larger_texts: Path) -> None:
    path = larger_texts / "wikitext2_valid.txt.xz"
    assert read("wikitext2", path, "evaluate") == [lzma.decompress(path.read_bytes()).decode()]
    texts = [text[:100_000] for text in read("wikitext2", path)]
    tokens = calibration_tokens(texts, tokenizer, 64, 128, 0)
    assert tuple(tokens.shape) == (64, 128) and tokens.unique().numel() > 500
    assert len(evaluation_sequences(texts, tokenizer, 128)) > 100
