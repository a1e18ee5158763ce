"""The interface of a stage, and the base classes of recipe sections and manifest steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Protocol, TypeGuard

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mkaq.run.estimate import Estimate, ModelSize, Task

if TYPE_CHECKING:
    from mkaq.checkpoint.reader import Checkpoint
    from mkaq.recipe import Recipe
    from mkaq.run.job import Job
    from mkaq.verify.case import Case

Dtype = Literal["float32", "bfloat16", "float16"]
Dataset = Literal["builtin", "mmlu", "wikitext2", "text", "jsonl"]
NO_TEXT = "is no text: it holds half a surrogate pair, or was not UTF-8"


class Section(BaseModel):
    """A section of the recipe; the docstrings of its fields are the help text."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        if isinstance(value, str) and value.encode(errors="ignore").decode() != value:
            raise ValueError(NO_TEXT)
        return value

    def how(self) -> str:
        """What it asks for, in a few words for a table."""
        return ""


class TextSection(Section):
    """Where text comes from and how much of it is read."""

    dataset: Dataset = "builtin"
    """`builtin` is English text that comes with Python; the others read the file or folder in `path`."""
    path: str | None = None
    """A file or folder, for every dataset except `builtin`. Text may be compressed (.gz, .xz)."""

    @model_validator(mode="after")
    def _path_fits_dataset(self) -> TextSection:
        if self.dataset == "builtin" and self.path is not None:
            raise ValueError("dataset builtin takes no path")
        if self.dataset != "builtin" and not self.path:
            raise ValueError(f"dataset {self.dataset} needs a path (a file or folder on this machine)")
        return self


Count = Annotated[int, Field(ge=0, lt=2**63)]
"""A number of layers, weights or bytes."""


def check_length(length: int, source: Checkpoint, where: str) -> None:
    """Checks that sequences fit into a model's context.

    Raises:
        UsageError: If they are longer than its positions.
    """
    from mkaq.errors import UsageError

    longest = source.sizes.positions
    if length > longest:
        raise UsageError(f"{length} is longer than the model's {longest} positions", where=where)


class Part(BaseModel):
    """A part of the manifest."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, populate_by_name=True
    )


class FinalNorm(Part):
    """How the final norm was rescaled; errors: fractions of the energy of its output, held-out tokens."""

    scale: float = Field(gt=0)
    """The factor."""
    error_before: float
    """Error with factor 1."""
    error: float
    """Error with this factor."""

    def lines(self) -> list[str]:
        """The record in readable lines."""
        return [f"final norm times {self.scale:.4f}; error {self.error_before:.4f} to {self.error:.4f}"]


class Mode(NamedTuple):
    """How a stage computes.

    Attributes:
        fast: The result may differ from the model's own forward pass in the last digits.
        alone: Only the first process runs it.
        plain: No floating-point computation: the result depends only on section and inputs.
        float32: Weights and hidden states are in float32, whatever the model's type.
    """

    fast: bool = False
    alone: bool = False
    plain: bool = False
    float32: bool = False


class Step(Part):
    """A step of the manifest: what a stage did to the model."""

    layers_before: Count
    """Decoder layers before."""
    layers_after: Count
    """Decoder layers after."""
    parameters_before: Count
    """Number of weights before."""
    parameters_after: Count
    """Number of weights after."""
    bytes_before: Count
    """Bytes of all tensors before."""
    bytes_after: Count
    """Bytes of all tensors after."""
    step: str
    """Kind."""
    method: str
    """Method."""

    def follows(self) -> bool:
        """Whether all weights that the step made follow from its input and this record."""
        return True

    def modes(self) -> Mapping[str, Mode]:
        """Additional computations, and their modes."""
        return {}

    def fallbacks(self) -> list[str]:
        """What could not be done as the recipe asked, so that quality may be lost; each in a few words."""
        return []

    def proofs(self) -> Sequence[str]:
        """Files shipped with the artifact so that the record can be verified."""
        return ()

    def groups(self) -> list[list[int]] | None:
        """For each layer, the source layers that it replaces; None if the step does not change them."""
        return None


class Made(NamedTuple):
    """The results of a stage besides its files.

    Attributes:
        facts: The fields of its record, without sizes and settings.
        digests: sha256 of files that it has already hashed, by name.
    """

    facts: Mapping[str, Any] = {}
    digests: Mapping[str, str] = {}


Row = tuple[str, ...]


class Curves(NamedTuple):
    """Measurements that the report draws above their table.

    Attributes:
        steps: When they were made.
        lines: A value for each step, by what was measured.
        kept: The step whose weights are kept.
    """

    steps: Sequence[int]
    lines: Mapping[str, Sequence[float]]
    kept: int


class Table(NamedTuple):
    """A table of the report."""

    title: str
    header: Row
    rows: Sequence[Row]
    curves: Curves | None = None


class Description(NamedTuple):
    """A record in readable form.

    Attributes:
        sentence: For the model card.
        lines: For `mkaq inspect` and the report.
        tables: For the report.
    """

    sentence: str
    lines: Sequence[str]
    tables: Sequence[Table] = ()


class Stage(Protocol):
    """A module of this package; one with a `Record` makes a model."""

    NAME: str
    """Name of its folder, and of its step in the manifest."""
    LESS: str
    """Advice on how to make it use less memory."""
    SOONER: str
    """Advice on how to make it end sooner."""

    def section(self, recipe: Recipe, source: Checkpoint) -> Section | None:
        """Its section of a recipe; None if the recipe does not need it."""

    def mode(self, section: Any) -> Mode:
        """How it computes."""

    def inputs(self, section: Any, job: Job) -> Mapping[str, str]:
        """Names and digests of its inputs."""

    def estimate(self, section: Any, before: ModelSize, task: Task) -> Estimate:
        """Its expected memory, and the size of the model that it makes.

        Raises:
            UsageError: If the section does not fit the model.
            UnsupportedError: If the model is not supported.
        """

    def run(self, section: Any, job: Job, folder: Path) -> Made:
        """Writes its files into a folder."""


class ModelStage(Stage, Protocol):
    """A stage that makes a model."""

    @property
    def Record(self) -> type[Step]:  # noqa: N802
        """The class of its record."""

    def describe(self, record: Any) -> Description:
        """A record in readable form."""

    def check(self, record: Any, case: Case) -> None:
        """Verifies a record, for `mkaq verify --source`.

        Raises:
            VerificationError: If the record contradicts itself.
        """


def makes_model(stage: Stage) -> TypeGuard[ModelStage]:
    """Whether a stage makes a model."""
    return hasattr(stage, "Record")
