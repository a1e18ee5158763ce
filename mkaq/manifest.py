"""mkaq-manifest.json: a verifiable record of what was done to every layer.

The file has one canonical form and contains its own digest, so any changed byte is detected; `files` covers
every other file of the artifact.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import AfterValidator, Field, ValidationError

from mkaq import __version__
from mkaq.digests import digest_of, library_versions
from mkaq.errors import UsageError, VerificationError
from mkaq.pipeline import STAGES
from mkaq.run.quality import fallbacks_of
from mkaq.stages.base import Count, Part, Step
from mkaq.stages.export import MAIN

if TYPE_CHECKING:
    from mkaq.recipe import Recipe
    from mkaq.run.job import Job

    AnyStep = Step
else:
    AnyStep = Annotated[
        Union[tuple(stage.Record for stage in STAGES if hasattr(stage, "Record"))],  # noqa: UP007
        Field(discriminator="step"),
    ]


def _has_perplexity(measured: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(measured.get("perplexity", ""), float | None):
        raise ValueError("perplexity is neither a number nor null")
    return measured


Measured = Annotated[dict[str, Any], AfterValidator(_has_perplexity)]
"""What was measured, and how."""

MANIFEST = "mkaq-manifest.json"
SCHEMA: Literal["mkaq-manifest/1"] = "mkaq-manifest/1"


class FileEntry(Part):
    """A file and its digest."""

    path: str
    """Path relative to the folder."""
    bytes: Count
    """Size in bytes."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """sha256 of the file."""


class Source(Part):
    """The model that was compressed."""

    path: str
    """Path or id given in the recipe."""
    revision: str | None
    """Hub commit, if it came from the hub."""
    base_model: str | None = None
    """Hub id, if known."""
    model_type: str
    """Model family."""
    parameters: Count
    """Number of weights."""
    bytes: Count
    """Bytes of all tensors."""
    layers: Count
    """Decoder layers."""
    files: list[FileEntry]
    """Every file that was read."""


class Calibration(Part):
    """The calibration tokens."""

    dataset: str
    """Dataset of the text."""
    num_samples: int
    """Number of sequences."""
    max_seq_length: int
    """Tokens per sequence."""
    seed: int
    """Seed of the choice of sequences."""
    tokens_sha256: str
    """Digest of the token ids as little-endian int32, sample after sample."""


class RanOn(Part):
    """The environment of a stage: it determines the last bits of sums, and so the choices based on them."""

    device: str
    """`cpu`, or the GPU's name."""
    compute_dtype: str
    """Type of the hidden states."""
    fast_bfloat16: bool
    """Whether matrix products that tolerate it used bfloat16."""
    threads: int
    """Number of torch threads."""
    processes: int
    """Number of processes that shared the samples."""


class BudgetOption(Part):
    """An option of a budget: removed layers and bits."""

    removed: Count
    """Number of layers removed."""
    bits: int | None
    """Bits of GPTQ, if it is used."""
    bytes: Count
    """Size of the resulting weights."""


class BudgetTrial(BudgetOption):
    """An option that was run."""

    perplexity: float | None
    """Perplexity of the result, from the recipe's evaluate.perplexity; null: not finite."""


class Budget(Part):
    """The search for the layers and bits that meet a budget."""

    target: dict[str, Any]
    """The recipe's budget section; `recipe` holds the choice in its place."""
    tried: list[BudgetTrial]
    """Trials in order."""
    chosen: BudgetOption
    """The chosen option."""


class ExportedFormat(Part):
    """The artifact in another format, in a folder of its own."""

    format: str
    """The format, and the name of its folder."""
    bytes: Count
    """Size of its files."""


class Manifest(Part):
    """The record of an artifact."""

    schema_: Literal["mkaq-manifest/1"] = Field(default=SCHEMA, alias="schema")
    """Version of this format."""
    name: str
    """Name of the run."""
    mkaq_version: str
    """Version of mkaq."""
    libraries: dict[str, str]
    """Versions of the libraries that affect numerical results."""
    recipe: dict[str, Any]
    """The resolved recipe."""
    source: Source
    """The source model."""
    calibration: Calibration | None
    """The calibration tokens, on which layers were compared and errors measured."""
    budget: Budget | None = None
    """The search of a budget, if the recipe had one."""
    steps: list[AnyStep]
    """The steps in order."""
    fallbacks: dict[str, list[str]] = Field(default_factory=dict)
    """For each step that could not do all that the recipe asked, what it did not, in a few words. They follow
    from the steps."""
    ran_on: dict[str, RanOn]
    """The environment of each stage that computes."""
    evaluation: dict[str, dict[str, Measured]]
    """Measurements by stage; a perplexity of null is not finite."""
    exports: list[ExportedFormat] = Field(default_factory=list)
    """The formats beside safetensors; `verify` compares each with the safetensors, bit for bit."""
    files: list[FileEntry]
    """Every file of the artifact except this one."""
    digest: str = ""
    """sha256 of all fields above in canonical JSON."""


def build_manifest(
    recipe: "Recipe", job: "Job", source_files: list[dict[str, Any]], budget: dict[str, Any] | None
) -> Manifest:
    """The manifest of a run, complete except for the artifact's own files.

    Args:
        recipe: The resolved recipe.
        job: Its job, with all models made.
        source_files: Path, bytes and sha256 of each file of the source.
        budget: The record of the search for a budget.
    """
    from mkaq.calibrate.tokens import tokens_digest
    from mkaq.checkpoint.hub_id import hub_id_of

    source, size = job.source, job.sizes[0]
    from_hub = source.path.parent.name == "snapshots"
    calibration = None
    if job.has("calibrate"):
        section = recipe.calibration.model_dump(exclude={"path"})
        calibration = Calibration(**section, tokens_sha256=tokens_digest(job.tokens()))
    return Manifest(
        name=recipe.name,
        mkaq_version=__version__,
        libraries=library_versions(),
        recipe=recipe.dump(),
        source=Source(
            path=recipe.model.path,
            revision=source.path.name if from_hub else recipe.model.revision,
            base_model=recipe.model.base_model or hub_id_of(source.path, source.config),
            model_type=source.config["model_type"],
            parameters=size.parameters,
            bytes=size.bytes,
            layers=size.layers,
            files=[FileEntry(**entry) for entry in source_files],
        ),
        calibration=calibration,
        budget=None if budget is None else Budget(**budget),
        steps=job.steps,
        fallbacks=fallbacks_of(job.steps),
        ran_on={stage: RanOn(**environment) for stage, environment in job.ran_on.items()},
        evaluation=job.evaluation,
        files=[],
    )


def write_manifest(folder: Path, manifest: Manifest, files: list[dict[str, Any]]) -> None:
    """Writes the manifest of an artifact: with its files, and with a digest of itself."""
    exports = [
        ExportedFormat(format=name, bytes=sum(f["bytes"] for f in files if f["path"].startswith(f"{name}/")))
        for name in manifest.recipe["export"]["formats"]
        if name != MAIN
    ]
    entries = [FileEntry(**entry) for entry in files]
    data = _data(manifest.model_copy(update={"exports": exports, "files": entries}))
    data["digest"] = digest_of(data)
    (folder / MANIFEST).write_bytes(_canonical(data))


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of an artifact and checks its integrity.

    Raises:
        UsageError: If there is no such folder.
        VerificationError: If it is missing, altered or of another schema.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise UsageError(what, where=folder, fix="name the folder `artifact` of a run")
    where = folder / MANIFEST
    try:
        raw = where.read_bytes()
        data = json.loads(raw)
        manifest = Manifest.model_validate(data)
        _data(manifest)  # a ValueError if it is nested too deep to be written again
        recorded = data.pop("digest", None)
        intact = recorded == digest_of(data) and _canonical({**data, "digest": recorded}) == raw
    except FileNotFoundError:
        what, fix = "no manifest: this is no artifact of mkaq", "name the folder `artifact` of a run"
        raise VerificationError(what, where=where, fix=fix) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise VerificationError(f"is altered: {key}: {first['msg']}", where=where) from None
    except (OSError, ValueError, RecursionError) as error:
        raise VerificationError(f"is damaged: {error}", where=where) from None
    if not intact:
        raise VerificationError("is altered: its digest does not match its content", where=where)
    return manifest


def manifest_schema() -> dict[str, Any]:
    """The JSON schema of a manifest."""
    return Manifest.model_json_schema(by_alias=True)


def _data(manifest: Manifest) -> dict[str, Any]:
    return manifest.model_dump(mode="json", by_alias=True, exclude={"digest"}, exclude_none=False)


def _canonical(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
