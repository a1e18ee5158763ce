"""What is fuzzed: for each kind of file, a function that reads one as mkaq does.

Only mkaq's own errors may come out, each with its exit code. What is read may not contradict itself either.
"""

import contextlib
import io
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mkaq.arch.config import keep_layers
from mkaq.calibrate.text import documents
from mkaq.checkpoint.reader import INDEX, SINGLE, Checkpoint
from mkaq.checkpoint.validate import open_checkpoint, read_headers
from mkaq.cli.artifact import _print_manifest
from mkaq.console import print_json
from mkaq.dtypes import DTYPES
from mkaq.errors import MkaqError, VerificationError
from mkaq.export.gguf_check import faults
from mkaq.generate.llamacpp import fields_of
from mkaq.manifest import MANIFEST, read_manifest
from mkaq.merge.origins import ORIGINS, read_origins, write_origins
from mkaq.pipeline import stage_of
from mkaq.recipe import Recipe
from mkaq.recipe_file import load_recipe
from mkaq.run.provenance import provenance_of, reason
from mkaq.run.publish import HANDOFF, _find, read_handoff, read_provenance
from mkaq.run.quality import fallbacks_of
from mkaq.verification import _budget_claims, _export_claims, _size_claims
from mkaq.verify.case import Case
from mkaq.verify.files import check_files
from tests.fuzz import samples

Read = Callable[[bytes], object]


def header(folder: Path) -> Read:
    """The header of a safetensors file, and the tensors that it describes."""

    def read(data: bytes) -> None:
        (folder / SINGLE).write_bytes(data)
        checkpoint = Checkpoint(folder, {}, read_headers(folder))
        for name, info in checkpoint.tensors.items():
            assert 8 <= info.start <= len(data), name
            if info.dtype in DTYPES:
                assert info.start + info.nbytes <= len(data), name
                with suppress(MkaqError):  # NaN
                    checkpoint.read([name])

    return read


def index(folder: Path) -> Read:
    """model.safetensors.index.json, and the checkpoint that it holds together."""
    model = samples.model(folder)

    def read(data: bytes) -> None:
        (model / INDEX).write_bytes(data)
        assert open_checkpoint(model).num_layers == samples.LAYERS

    return read


def config(folder: Path) -> Read:
    """config.json of a checkpoint, and what it becomes when the model loses layers."""
    model = samples.model(folder)

    def read(data: bytes) -> None:
        (model / "config.json").write_bytes(data)
        opened = open_checkpoint(model, quantized=True)
        where, resolved = model / "config.json", opened.hf_config.to_dict()
        assert keep_layers(opened.config, resolved, [0], where)["num_hidden_layers"] == 1

    return read


def recipe(folder: Path) -> Read:
    """A recipe, which read again as it was resolved is the same; or a setting of the command line."""
    (folder / "plain.yaml").write_bytes(samples.PLAIN)

    def read(data: bytes) -> None:
        if data.startswith(samples.SETTING):
            setting = data.removeprefix(samples.SETTING).replace(b"\0", b"")
            loaded = load_recipe(folder / "plain.yaml", [os.fsdecode(setting)])
        else:
            (folder / "recipe.yaml").write_bytes(data)
            loaded = load_recipe(folder / "recipe.yaml")
        resolved = loaded.dump()
        assert Recipe.model_validate(resolved).dump() == resolved

    return read


def manifest(folder: Path) -> Read:
    """mkaq-manifest.json, as `inspect` shows it and as `verify` compares it with files and source."""
    model = open_checkpoint(samples.model(folder))
    write_origins(model.path / ORIGINS, samples.ORIGINS)

    def read(data: bytes) -> None:
        (folder / MANIFEST).write_bytes(data)
        found = read_manifest(folder)
        with contextlib.redirect_stdout(io.StringIO()):
            _print_manifest(found)
            print_json(found.model_dump(mode="json", by_alias=True))
        check_files(folder, found.files, beside=MANIFEST)
        list(_size_claims(found, model)), list(_budget_claims(found)), fallbacks_of(found.steps)
        for step in found.steps:
            stage = stage_of(step.step)
            stage.describe(step)
            step.follows(), step.modes(), step.proofs()
            with suppress(VerificationError):
                stage.check(step, Case(model, model))
        list(_export_claims(found, model))

    return read


def gguf(folder: Path) -> Read:
    """A GGUF file, as `generate` and `verify` read it."""
    metadata, tensors = samples.gguf_plan(folder)
    whole = (folder / "whole.gguf").read_bytes()

    def read(data: bytes) -> None:
        path = folder / "model.gguf"
        path.write_bytes(data)
        found = list(faults(path, metadata, tensors))
        assert not (found and data == whole), found
        fields_of(path)

    return read


def handoff(folder: Path) -> Read:
    """handoff.json of a stage, as the next run reads it."""

    def read(data: bytes) -> None:
        path = folder / HANDOFF
        path.write_bytes(data)
        found = read_handoff(path)
        _find(folder, path, found["fingerprint"], lambda line: None)
        reason(provenance_of("merge", {"layers": 1}, {"source": "0"}), [read_provenance(path)])

    return read


def origins(folder: Path) -> Read:
    """mkaq-origins.json of an artifact with fused layers."""

    def read(data: bytes) -> None:
        (folder / ORIGINS).write_bytes(data)
        read_origins(folder / ORIGINS)

    return read


def text(folder: Path) -> Read:
    """Text of every kind, compressed or not; refused if no reader takes it."""
    for name in ("data/dev", "data/test"):
        (folder / name).mkdir(parents=True)
    files = {
        "text": ("a.txt", "a.txt.gz", "a.txt.xz"),
        "jsonl": ("a.jsonl", "a.jsonl.gz"),
        "mmlu": ("data/dev/x_dev.csv",),
    }

    def read(data: bytes) -> None:
        refused: list[MkaqError] = []
        for dataset, names in files.items():
            for name in names:
                (folder / name).write_bytes(data)
                try:
                    documents(dataset, str(folder if dataset == "mmlu" else folder / name), "calibrate")
                except MkaqError as error:
                    refused.append(error)
        if len(refused) == sum(map(len, files.values())):
            raise refused[0]

    return read


READERS: dict[str, Callable[[Path], Read]] = {
    "header": header,
    "index": index,
    "recipe": recipe,
    "manifest": manifest,
    "gguf": gguf,
    "config": config,
    "handoff": handoff,
    "origins": origins,
    "text": text,
}
