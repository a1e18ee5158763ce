"""mkaq-manifest.json: what was done to every layer, in a form that can be checked.

The file is written in one canonical form and carries a digest of itself, so that no byte of it
can change unnoticed; `files` covers every other file of the artifact.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mkaq.digests import digest_of
from mkaq.errors import VerificationError

MANIFEST = "mkaq-manifest.json"
SCHEMA: Literal["mkaq-manifest/1"] = "mkaq-manifest/1"


class _Part(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, populate_by_name=True
    )


class FileEntry(_Part):
    """A file and its digest."""

    path: str
    """Relative to the folder."""
    bytes: int
    """Its size."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Its digest."""


class Source(_Part):
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


class Calibration(_Part):
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


class MergeEntry(_Part):
    """One merge of two neighbouring groups, named by their first layers."""

    into: int
    """The group that stays."""
    from_: int = Field(alias="from")
    """The group that goes."""
    coefficient: float
    """Weight of the group that stays."""
    similarity: float | None
    """NPIB of the two groups, where it was asked for."""


class MeasuredGroup(_Part):
    """A group of neighbouring layers that was tried."""

    first: int
    """Its first layer."""
    layers: int
    """How many layers it has."""
    error: float
    """What merging it alone costs: mean Kullback-Leibler divergence of the next-token distributions from
    the source's over held-out tokens, in nats."""


class Solved(_Part):
    """A weight that was solved in closed form; errors are shares of the target's energy, held-out tokens."""

    ridge: float | None
    """The ridge that was best on held-out tokens; null: no ridge helped, the weight is as it was."""
    error_before: float
    """With the weight as it was."""
    error: float
    """With the weight as it is."""


class Fused(_Part):
    """How a layer was put together from heads and channels of several."""

    origins_sha256: str
    """Digest of the layer's entry in mkaq-origins.json."""
    attention: Solved
    """`o_proj`."""
    mlp: Solved
    """`down_proj`."""
    residual: float
    """Mean of |output - original|^2 / |original|^2 over held-out tokens, on the compressed prefix."""


class FinalNorm(_Part):
    """How the final norm was rescaled; errors are shares of the energy of its output, held-out tokens."""

    scale: float = Field(gt=0)
    """The factor."""
    error_before: float
    """With factor 1."""
    error: float
    """With this factor."""


class NewLayer(_Part):
    """A layer of the result and the layers of the source that it stands for."""

    new: int
    """Its number."""
    from_: dict[Annotated[str, Field(pattern=r"^\d{1,4}$")], float] = Field(alias="from", min_length=1)
    """Old layer and weight. Averaged: summed in this order in float32, cast once. Fused: the share of
    the channels that came from it; the first layer gives the norms."""
    fused: Fused | None = None
    """How it was fused, if it was."""
    sha256: str
    """Over the names and bytes of its merged tensors, in order of name."""


class RecoveredLayer(_Part):
    """A layer that was tuned; errors are mean of |output - original|^2 / |original|^2, held-out tokens."""

    new: int
    """Its number."""
    error_before: float
    """On the tuned prefix, with the weights that merging gave."""
    error: float
    """With the weights that it has."""
    steps: int
    """The step at which the held-out error was lowest; 0: the weights are those of the merge."""


class _Sized(_Part):
    layers_before: int
    """Decoder layers before."""
    layers_after: int
    """Decoder layers after."""
    parameters_before: int
    """Weights before."""
    parameters_after: int
    """Weights after."""
    bytes_before: int
    """Bytes of all tensors before."""
    bytes_after: int
    """Bytes of all tensors after."""


class MergeStep(_Sized):
    """Layer merging."""

    step: Literal["merge"] = "merge"
    """Kind."""
    method: Literal["mka"] = "mka"
    """Method."""
    dtype: Literal["float64", "float32", "bfloat16", "float16"]
    """Type of the merged tensors."""
    settings: dict[str, Any]
    """The recipe's section: order, coefficient, manifold, bins, bias correction."""
    merges: list[MergeEntry]
    """Of averages, in the order in which they were chosen."""
    measured: list[MeasuredGroup] = []
    """Every group that was tried (order: measured)."""
    layers: list[NewLayer]
    """Every layer of the result."""
    final_norm: FinalNorm | None = None
    """How the final norm was rescaled, if it was."""


class RecoverStep(_Sized):
    """Tuning, layer by layer, toward the hidden states of the source."""

    step: Literal["recover"] = "recover"
    """Kind."""
    method: Literal["layerwise"] = "layerwise"
    """Method."""
    settings: dict[str, Any]
    """The recipe's section."""
    layers: list[RecoveredLayer]
    """Every layer."""
    final_norm: FinalNorm
    """How the final norm was rescaled, after the merge did."""


class Module(_Part):
    """A quantized linear layer."""

    name: str
    """In the model."""
    weight_error: float
    """||W - Q||^2 / ||W||^2, W the weight that was rounded."""
    error: float | None = None
    """||X (W - Q)^T||^2 / ||X W^T||^2 over the calibration tokens (gptq)."""
    damp_percent: float | None = None
    """The damping that was needed (gptq)."""
    ridge: float | None = None
    """If W was solved toward the original model before it was rounded: the ridge (gptq)."""
    fallback: Literal[False] = False
    """mkaq has no fallback: a layer is quantized as asked, or the run ends."""


class RanOn(_Part):
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


class QuantizeStep(_Sized):
    """Quantization."""

    step: Literal["quantize"] = "quantize"
    """Kind."""
    method: Literal["gptq", "bitsandbytes"]
    """Method."""
    bits: int
    """Bits per weight."""
    settings: dict[str, Any]
    """The recipe's section."""
    modules: list[Module]
    """Every quantized layer."""
    final_norm: FinalNorm | None = None
    """How the final norm was rescaled, if weights were solved toward the original model."""
    residuals: list[float] | None = None
    """After each layer the mean of |output - original|^2 / |original|^2 over held-out tokens, where weights
    do not follow from the source: they were fused, tuned or solved before they were quantized."""


class BudgetOption(_Part):
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


class Budget(_Part):
    """The search for the layers and bits that meet a budget."""

    target: dict[str, Any]
    """The recipe's section, in the place of which `recipe` holds the choice."""
    tried: list[BudgetTrial]
    """In order."""
    chosen: BudgetOption
    """The answer."""


class Manifest(_Part):
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
    steps: list[Annotated[MergeStep | RecoverStep | QuantizeStep, Field(discriminator="step")]]
    """What was done, in order."""
    ran_on: dict[str, RanOn]
    """What each stage that computes has run on."""
    evaluation: dict[str, dict[str, Any]]
    """What was measured, by stage."""
    files: list[FileEntry]
    """Every file of the artifact but this one."""
    digest: str = ""
    """sha256 of all the above in canonical JSON."""


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
