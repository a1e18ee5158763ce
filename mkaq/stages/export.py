"""The artifact: the last model in each format, with a model card and the manifest."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from mkaq.stages.base import Section

if TYPE_CHECKING:
    from mkaq.checkpoint.reader import Checkpoint
    from mkaq.export.settings import Settings
    from mkaq.manifest import Manifest
    from mkaq.run.job import Job

MAIN: Literal["safetensors"] = "safetensors"


class GgufSection(Section):
    """The types in a GGUF file of what GPTQ leaves as it is. The blocked types (q8_0, q4_0) round."""

    embedding: Literal["source", "f32", "f16", "bf16", "q8_0", "q4_0"] = "source"
    """Type of the embedding, and of a head of its own; `source` is the checkpoint's."""
    dense: Literal["source", "f16", "q8_0"] = "source"
    """Type of the linear layers of a model that is not quantized."""


class ExportSection(Section):
    """The files of the artifact."""

    formats: list[Literal["safetensors", "gguf", "compressed-tensors", "mlx"]] = Field(default=[MAIN])
    """Formats to write: safetensors always, others in folders of their own, with the same codes."""
    gguf: GgufSection | None = None
    """Types in the GGUF file, or null."""
    shard_size: str = "4GB"
    """Largest size of one weight file, e.g. `500MB` or `4GB`; a larger tensor gets its own file."""

    @field_validator("shard_size")
    @classmethod
    def _is_a_size(cls, value: str) -> str:
        from mkaq.units import parse_size

        parse_size(value)
        return value

    @field_validator("formats")
    @classmethod
    def _has_the_main_one(cls, value: list[str]) -> list[str]:
        if MAIN not in value or len(set(value)) < len(value):
            raise ValueError("names safetensors, from which the others are made, and each format once")
        return value

    @model_validator(mode="after")
    def _gguf_is_written(self) -> ExportSection:
        if self.gguf is not None and "gguf" not in self.formats:
            raise ValueError("nothing reads export.gguf: formats has no gguf")
        return self

    @property
    def others(self) -> list[str]:
        """The formats beside safetensors."""
        return [name for name in self.formats if name != MAIN]


def settings_of(manifest: Manifest) -> Settings:
    """What the other formats are told; it depends only on the manifest."""
    from mkaq.export.settings import GgufTypes, Settings
    from mkaq.units import parse_size

    section = ExportSection.model_validate(manifest.recipe["export"])
    types = GgufTypes(**(section.gguf or GgufSection()).model_dump())
    return Settings(manifest.name, manifest.source.base_model, parse_size(section.shard_size), types)


def check_formats(section: ExportSection, source: Checkpoint, config: dict[str, Any] | None) -> None:
    """Refuses formats that cannot hold the model to come.

    Args:
        section: The recipe's section.
        source: The model to compress.
        config: The quantization_config of the result; None for a dense one.

    Raises:
        UsageError: If the package that writes one is missing.
        UnsupportedError: If there is one.
    """
    from mkaq.errors import UnsupportedError
    from mkaq.export.formats import EXPORTS

    reasons = {name: EXPORTS[name].refusal(source, config) for name in section.others}
    refused = {name: reason for name, reason in reasons.items() if reason}
    if refused:
        what = "; ".join(f"{name} cannot hold this model: {reason}" for name, reason in refused.items())
        fix = f"leave {' and '.join(refused)} out, or change quantize"
        raise UnsupportedError(what, where="export.formats", fix=fix)


def run(job: Job, manifest: Manifest, card: str, folder: Path) -> list[dict[str, Any]]:
    """Writes the artifact, without its manifest.

    Args:
        job: The job, with its last model made.
        manifest: The manifest, without files.
        card: Text of README.md.
        folder: An empty folder.

    Returns:
        Path, bytes and sha256 of every file.
    """
    from mkaq.digests import describe_files
    from mkaq.export.formats import EXPORTS

    for path in _files(job):
        if path.is_file():
            name = path.relative_to(job.model.path) if path.is_relative_to(job.model.path) else path.name
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)
    (folder / "README.md").write_text(card, encoding="utf-8")
    settings = settings_of(manifest)
    for name in ExportSection.model_validate(manifest.recipe["export"]).others:
        (folder / name).mkdir()
        EXPORTS[name].write(job.model, folder / name, settings)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return describe_files(folder, names)


def _files(job: Job) -> Iterator[Path]:
    """The files of the last model, and those of earlier stages that verification needs."""
    for name in (*job.model.files, "quantize_config.json"):
        yield job.model.path / name
    for step in job.steps:
        yield from (job.path(step.step) / name for name in step.proofs())
