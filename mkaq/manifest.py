"""mkaq-manifest.json: what was done to every layer, in a form that can be checked.

The file is written in one canonical form and carries a digest of itself, so that no byte of it
can change unnoticed; `files` covers every other file of the artifact.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import Field, ValidationError

from mkaq import __version__
from mkaq.digests import digest_of, library_versions
from mkaq.errors import VerificationError
from mkaq.pipeline import STAGES
from mkaq.stages.base import Part, Step

if TYPE_CHECKING:
    from mkaq.recipe import Recipe
    from mkaq.run.job import Job

    AnyStep = Step
else:
    AnyStep = Annotated[
        Union[tuple(stage.Record for stage in STAGES if hasattr(stage, "Record"))],  # noqa: UP007
        Field(discriminator="step"),
    ]

MANIFEST = "mkaq-manifest.json"
SCHEMA: Literal["mkaq-manifest/1"] = "mkaq-manifest/1"


class FileEntry(Part):
    """A file and its digest."""

    path: str
    """Relative to the folder."""
    bytes: int
    """Its size."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Its digest."""


class Source(Part):
    """The model that was compressed."""

    path: str
    """As the recipe names it."""
    revision: str | None
    """The hub commit, where it came from the hub."""
    base_model: str | None = None
    """Its hub id, where that is known."""
    model_type: str
    """Family."""
    parameters: int
    """Number of weights."""
    bytes: int
    """Bytes of all tensors."""
    layers: int
    """Decoder layers."""
    files: list[FileEntry]
    """Every file that was read."""


class Calibration(Part):
    """The calibration tokens."""

    dataset: str
    """Where the text came from."""
    num_samples: int
    """Sequences."""
    max_seq_length: int
    """Tokens of each."""
    seed: int
    """Of the choice."""
    tokens_sha256: str
    """Digest of the token ids as little-endian int32, sample after sample."""


class RanOn(Part):
    """What a stage has run on: it decides the last bits of sums, and so choices that are made from them."""

    device: str
    """`cpu`, or the GPU's name."""
    compute_dtype: str
    """Type of the hidden states."""
    fast_bfloat16: bool
    """Whether matrix products that bear it were taken in bfloat16."""
    threads: int
    """Of torch."""
    processes: int
    """That shared the samples."""


class BudgetOption(Part):
    """How much could be merged, and with how many bits."""

    removed: int
    """Layers that go."""
    bits: int | None
    """Of GPTQ, if it is used."""
    bytes: int
    """Of the weights that come out."""


class BudgetTrial(BudgetOption):
    """An option that was run."""

    perplexity: float
    """What came out, by the recipe's evaluate.perplexity."""


class Budget(Part):
    """The search for the layers and bits that meet a budget."""

    target: dict[str, Any]
    """The recipe's section, in the place of which `recipe` holds the choice."""
    tried: list[BudgetTrial]
    """In order."""
    chosen: BudgetOption
    """The answer."""


class Manifest(Part):
    """The whole record of an artifact."""

    schema_: Literal["mkaq-manifest/1"] = Field(default=SCHEMA, alias="schema")
    """Version of this format."""
    name: str
    """Of the run."""
    mkaq_version: str
    """Of mkaq."""
    libraries: dict[str, str]
    """Versions of the libraries that change numbers."""
    recipe: dict[str, Any]
    """Resolved."""
    source: Source
    """What went in."""
    calibration: Calibration | None
    """What layers were compared and errors measured on."""
    budget: Budget | None = None
    """The search that settled the recipe, if it had a budget."""
    steps: list[AnyStep]
    """What was done, in order."""
    ran_on: dict[str, RanOn]
    """What each stage that computes has run on."""
    evaluation: dict[str, dict[str, Any]]
    """What was measured, by stage."""
    files: list[FileEntry]
    """Every file of the artifact but this one."""
    digest: str = ""
    """sha256 of all the above in canonical JSON."""


def build_manifest(
    recipe: "Recipe", job: "Job", source_files: list[dict[str, Any]], budget: dict[str, Any] | None
) -> Manifest:
    """The manifest of a run, complete but for the artifact's own files.

    Args:
        recipe: Resolved.
        job: With all its models made.
        source_files: Path, bytes and sha256 of what was read.
        budget: What the search for a budget tried and chose.
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
        ran_on={stage: RanOn(**told) for stage, told in job.ran_on.items()},
        evaluation=job.evaluation,
        files=[],
    )


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Writes a manifest with its digest."""
    data = _data(manifest)
    data["digest"] = digest_of(data)
    path.write_bytes(_canonical(data))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact, checked to be whole.

    Raises:
        VerificationError: If it is missing, altered or of another schema.
    """
    where = folder / MANIFEST
    try:
        raw = where.read_bytes()
        data = json.loads(raw)
        manifest = Manifest.model_validate(data)
        claimed = data.pop("digest", None)
        whole = claimed == digest_of(data) and _canonical({**data, "digest": claimed}) == raw
    except FileNotFoundError:
        raise VerificationError("no manifest: this is no artifact of mkaq", where=where) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise VerificationError(f"is altered: {key}: {first['msg']}", where=where) from None
    except (OSError, ValueError, RecursionError) as error:
        raise VerificationError(f"is damaged: {error}", where=where) from None
    if not whole:
        raise VerificationError("is altered: its digest does not match its content", where=where)
    return manifest


def manifest_schema() -> dict[str, Any]:
    """The JSON schema of a manifest."""
    return Manifest.model_json_schema(by_alias=True)


def _data(manifest: Manifest) -> dict[str, Any]:
    return manifest.model_dump(mode="json", by_alias=True, exclude={"digest"}, exclude_none=False)


def _canonical(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
