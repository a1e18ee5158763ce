"""Text sources as lists of documents, split so that calibration never reads evaluation text."""

import ast
import csv
import functools
import gzip
import hashlib
import io
import json
import lzma
import re
import sysconfig
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from mkaq.digests import digest_of
from mkaq.errors import UsageError
from mkaq.paths import user_path
from mkaq.units import human

Split = Literal["calibrate", "evaluate"]
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_XZ_MEMORY = 1 << 30  # bytes that unpacking may take; what `xz -9` writes takes 65 MiB
_TEXT_SUFFIXES = (".txt", ".raw", ".tokens", ".md")
_COMPRESSED = (".gz", ".xz")
_BLOCK = 1 << 20
_MOST = 100  # times the size of a compressed file, more than any text shrinks
_HARMLESS = 64 << 20  # bytes, however small they were compressed


def documents(dataset: str, where: str | None, split: Split) -> list[str]:
    """The documents of a data set.

    For `builtin` every fifth document is for evaluation; `wikitext2` has train and test files, `mmlu` has dev
    and test folders; for `text` and `jsonl` the user's choice of files is the split. Lone surrogates, which a
    JSON string can hold and UTF-8 cannot, become U+FFFD.

    Args:
        dataset: The data set's name in the recipe.
        where: A file or folder; None for `builtin`.
        split: The split to read.

    Raises:
        UsageError: If the path is missing, unreadable or of another layout.
    """
    if dataset == "builtin":
        return [
            text
            for number, text in enumerate(builtin_documents())
            if (number % 5 == 4) == (split == "evaluate")
        ]
    check_exists(dataset, where)
    path = user_path(where or "")
    readers: dict[str, Callable[[Path, Split], list[str]]] = {
        "text": _text,
        "jsonl": _jsonl,
        "wikitext2": _wikitext2,
        "mmlu": _mmlu,
    }
    texts = (_LONE_SURROGATE.sub("\ufffd", text) for text in readers[dataset](path, split))
    kept = [text for text in texts if text.strip()]
    if not kept:
        raise UsageError("holds no text", where=path)
    return kept


@functools.cache
def builtin_documents() -> tuple[str, ...]:
    """English text in every Python: the language reference and the docstrings of the standard library."""
    from pydoc_data import topics

    texts = [topics.topics[name] for name in sorted(topics.topics)]
    library = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(library.glob("*.py")) + sorted(library.glob("[a-h]*/*.py")):
        if "site-packages" in file.parts or "dist-packages" in file.parts or "idlelib" in file.parts:
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        nodes = [n for n in statements(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
        docs = [doc for node in nodes if (doc := ast.get_docstring(node)) and len(doc) > 80]
        if docs:
            texts.append("\n\n".join(docs))
    return tuple(texts)


def statements(tree: ast.Module) -> Iterator[ast.AST]:
    """A module and its statements as `ast.walk` orders them, without a look into expressions."""
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        yield (node := waiting.popleft())
        for field in ("body", "handlers", "cases", "orelse", "finalbody"):
            found = getattr(node, field, ())
            waiting.extend(found if isinstance(found, list) else ())


def read_text(path: Path) -> str:
    """Reads a UTF-8 text file without its byte order mark; .gz and .xz files are decompressed.

    Raises:
        UsageError: If it cannot be read, or decompresses to far more than its size.
    """
    try:
        data = _decompressed(path) if path.suffix in _COMPRESSED else path.read_bytes()
        return data.decode("utf-8-sig")
    except (OSError, lzma.LZMAError, zlib.error, EOFError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot be read as UTF-8 text: {error}", where=path) from None


def _decompressed(path: Path) -> bytes:
    """What a compressed file holds, counted before it is kept: a small file can stand for terabytes."""
    unpack = _unpack_gz if path.suffix == ".gz" else _unpack_xz
    with path.open("rb") as file:
        size, allowed = 0, max(_HARMLESS, _MOST * path.stat().st_size)
        for block in unpack(file):
            size += len(block)
            if size > allowed:
                what = f"decompresses to more than {human(allowed)}, which no text of its size does"
                raise UsageError(what, where=path, fix="decompress it yourself if it is what you want")
        file.seek(0)
        return b"".join(unpack(file))


def _unpack_gz(file: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as handle:
        while block := handle.read(_BLOCK):
            yield block


def _unpack_xz(file: BinaryIO) -> Iterator[bytes]:
    data = file.read(_BLOCK)
    while data:  # one stream after another
        unpacker = lzma.LZMADecompressor(memlimit=_XZ_MEMORY)
        while not unpacker.eof:
            if unpacker.needs_input and not data:
                raise EOFError("it ends early")
            yield unpacker.decompress(data, _BLOCK)
            data = file.read(_BLOCK) if unpacker.needs_input else b""
        data = unpacker.unused_data.lstrip(b"\0") or file.read(_BLOCK)


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix


def _files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file() and _suffix(p) in suffixes)


def _text(path: Path, split: Split) -> list[str]:
    return [read_text(file) for file in _files(path, _TEXT_SUFFIXES)]


def jsonl_values(path: Path, key: str) -> Iterator[tuple[Path, int, Any]]:
    """A key of each line of the data set `jsonl` at a path: file, number and value; None where it is missing.

    Raises:
        UsageError: If a file cannot be read.
    """
    for file in _files(path, (".jsonl", ".ndjson")):
        for number, line in enumerate(read_text(file).split("\n"), 1):
            if line.strip():
                try:
                    yield file, number, json.loads(line)[key]
                except (ValueError, KeyError, TypeError, RecursionError):
                    yield file, number, None


def _jsonl(path: Path, split: Split) -> list[str]:
    result = []
    for file, number, text in jsonl_values(path, "text"):
        if not isinstance(text, str):
            raise UsageError(f'line {number} is not a JSON object with a "text" string', where=file)
        result.append(text)
    return result


def _wikitext2(path: Path, split: Split) -> list[str]:
    if path.is_file():
        return [read_text(path)]
    files = _files(path, _TEXT_SUFFIXES)
    for word in ("train",) if split == "calibrate" else ("test", "valid"):
        if chosen := [file for file in files if word in re.split(r"[._-]", file.name)]:
            return [read_text(file) for file in chosen]
    name = "wiki.train.raw" if split == "calibrate" else "wiki.test.raw"
    raise UsageError(f"holds no {name} (nor a .txt or .tokens of that split)", where=path)


def _mmlu(path: Path, split: Split) -> list[str]:
    kind = "dev" if split == "calibrate" else "test"
    folder = next((f for f in (path / "data" / kind, path / kind) if f.is_dir()), None)
    if folder is None:
        raise UsageError(
            f"holds no data/{kind} folder (MMLU's layout: data/{kind}/SUBJECT_{kind}.csv)", where=path
        )
    result = []
    for file in sorted(folder.glob(f"*_{kind}.csv")):
        subject = file.name.removesuffix(f"_{kind}.csv").replace("_", " ")
        questions = [f"The following are multiple choice questions (with answers) about {subject}.\n"]
        try:
            rows = list(csv.reader(io.StringIO(read_text(file), newline="")))
        except csv.Error as error:
            raise UsageError(f"is not CSV: {error}", where=file) from None
        for number, row in enumerate(rows, 1):
            if len(row) != 6 or row[5] not in ("A", "B", "C", "D"):
                raise UsageError(f"row {number} is not question, A, B, C, D, answer", where=file)
            choices = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", row[1:5], strict=True))
            questions.append(f"{row[0]}\n{choices}\nAnswer: {row[5]}\n")
        result.append("\n".join(questions))
    return result


def check_exists(dataset: str, where: str | None, key: str = "") -> None:
    """Checks that a data set's path exists.

    Args:
        dataset: The data set's name.
        where: Its file or folder.
        key: The key of the recipe that has it.

    Raises:
        UsageError: If it does not.
    """
    path = user_path(where or "")
    if dataset != "builtin" and not path.exists():
        fix = f"give {key or f'dataset {dataset}'} an existing path"
        raise UsageError("no such file or folder", where=path, fix=fix)


def text_digest(dataset: str, where: str | None) -> str:
    """Identifies the text of a data set: a digest of its files, or of the documents of `builtin`.

    Raises:
        UsageError: If the path is missing.
    """
    if dataset == "builtin":
        return digest_of(builtin_documents())
    path = user_path(where or "")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    if not files:
        raise UsageError("no such file or folder", where=path, fix=f"give dataset {dataset} an existing path")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode(errors="surrogateescape"))
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()
