"""What stages have in common: sections of the recipe, steps of the manifest, and what a stage must offer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeGuard

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
    """A part of the recipe; docstrings of its fields are the help."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        if isinstance(value, str) and value.encode(errors="ignore").decode() != value:
            raise ValueError(NO_TEXT)
        return value


class TextSection(Section):
    """Where text comes from and how much of it is read."""

    dataset: Dataset = "builtin"
    """`builtin` is English that every Python carries; the others read the file or folder in `path`."""
    path: str | None = None
    """A file or folder, for every dataset but `builtin`. Text may be compressed (.gz, .xz)."""

    @model_validator(mode="after")
    def _path_fits_dataset(self) -> TextSection:
        if self.dataset == "builtin" and self.path is not None:
            raise ValueError("dataset builtin takes no path")
        if self.dataset != "builtin" and not self.path:
            raise ValueError(f"dataset {self.dataset} needs a path (a file or folder on this machine)")
        return self


class Part(BaseModel):
    """A part of the manifest."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, populate_by_name=True
    )


class FinalNorm(Part):
    """How the final norm was rescaled; errors are shares of the energy of its output, held-out tokens."""

    scale: float = Field(gt=0)
    """The factor."""
    error_before: float
    """With factor 1."""
    error: float
    """With this factor."""

    def lines(self) -> list[str]:
        """For a person."""
        return [f"final norm times {self.scale:.4f}; error {self.error_before:.4f} to {self.error:.4f}"]


class Mode(NamedTuple):
    """How a stage computes.

    Attributes:
        fast: It may differ from the model's own forward pass in the last digits.
        alone: One process does it.
        plain: It does not compute: what it makes depends on its section and on what it reads alone.
    """

    fast: bool = False
    alone: bool = False
    plain: bool = False


class Step(Part):
    """What a stage did to the model: a step of the manifest."""

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
    step: str
    """Kind."""
    method: str
    """Method."""

    def follows(self) -> bool:
        """Whether every weight that it made follows from its input and this record."""
        return True

    def modes(self) -> Mapping[str, Mode]:
        """What else was computed, and how."""
        return {}

    def proofs(self) -> Sequence[str]:
        """Files that the artifact carries along, so that the record can be checked."""
        return ()

    def groups(self) -> list[list[int]] | None:
        """For each layer the layers of the source that it stands for; None if it left them alone."""
        return None


class Made(NamedTuple):
    """What a stage has to tell beside its files.

    Attributes:
        facts: The fields of its record, but for sizes and settings.
        digests: sha256 of files that it has hashed already, by name.
    """

    facts: Mapping[str, Any] = {}
    digests: Mapping[str, str] = {}


Row = tuple[str, ...]


class Table(NamedTuple):
    """A table of the report."""

    title: str
    header: Row
    rows: Sequence[Row]


class Description(NamedTuple):
    """A record for a person.

    Attributes:
        sentence: For the model card.
        lines: For `mkaq inspect` and the report.
        tables: For the report.
    """

    sentence: str
    lines: Sequence[str]
    tables: Sequence[Table] = ()


class Stage(Protocol):
    """A module of this package. One that has a `Record` makes a model."""

    NAME: str
    """Of its folder, and of its step in the manifest."""
    LESS: str
    """What makes it need less memory."""

    def section(self, recipe: Recipe, source: Checkpoint) -> Section | None:
        """What a recipe asks of it; None: nothing."""

    def mode(self, section: Any) -> Mode:
        """How it computes."""

    def inputs(self, section: Any, job: Job) -> Mapping[str, str]:
        """What it reads: names and digests."""

    def estimate(self, section: Any, before: ModelSize, task: Task) -> Estimate:
        """What it is expected to need and to make.

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
        """What it did."""

    def describe(self, record: Any) -> Description:
        """A record for a person."""

    def check(self, record: Any, case: Case) -> None:
        """What `mkaq verify --source` does for a record.

        Raises:
            VerificationError: If it contradicts itself.
        """


def makes_model(stage: Stage) -> TypeGuard[ModelStage]:
    """Whether a stage makes a model."""
    return hasattr(stage, "Record")
