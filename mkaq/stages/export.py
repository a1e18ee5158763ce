"""The artifact: the last model with a model card and the manifest."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from mkaq.stages.base import Section

if TYPE_CHECKING:
    from mkaq.run.job import Job


class ExportSection(Section):
    """The files of the artifact."""

    formats: list[Literal["safetensors"]] = Field(default=["safetensors"], min_length=1)
    """Formats to write."""
    shard_size: str = "4GB"
    """Largest size of one weight file, e.g. `500MB` or `4GB`; a larger tensor gets its own file."""

    @field_validator("shard_size")
    @classmethod
    def _is_a_size(cls, value: str) -> str:
        from mkaq.units import parse_size

        parse_size(value)
        return value


def run(job: Job, card: str, folder: Path) -> list[dict[str, Any]]:
    """Writes the artifact, without its manifest.

    Args:
        job: The job, with its last model made.
        card: Text of README.md.
        folder: An empty folder.

    Returns:
        Path, bytes and sha256 of every file.
    """
    from mkaq.digests import describe_files

    for path in _files(job):
        if path.is_file():
            name = path.relative_to(job.model.path) if path.is_relative_to(job.model.path) else path.name
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)
    (folder / "README.md").write_text(card, encoding="utf-8")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return describe_files(folder, names)


def _files(job: Job) -> Iterator[Path]:
    """The files of the last model, and those of earlier stages that verification needs."""
    for name in (*job.model.files, "quantize_config.json"):
        yield job.model.path / name
    for step in job.steps:
        yield from (job.path(step.step) / name for name in step.proofs())
