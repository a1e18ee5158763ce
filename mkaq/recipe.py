"""What a recipe may say: frozen models that forbid unknown keys; their docstrings are the help.

`recipe_file.load_recipe` reads one. The resolved recipe (defaults filled in) is what a run records;
reading it again gives the same recipe.
"""

from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from mkaq.checkpoint.hub_id import is_hub_id
from mkaq.stages.base import Dtype, Section
from mkaq.stages.calibrate import CalibrationSection
from mkaq.stages.evaluate import EvaluateSection
from mkaq.stages.export import ExportSection
from mkaq.stages.merge import MergeSection
from mkaq.stages.quantize import GptqBits, GptqSection, QuantizeSection
from mkaq.stages.recover import LayerwiseSection
from mkaq.units import parse_size


def _size(value: str) -> str:
    parse_size(value)
    return value


class ModelSection(Section):
    """The model to compress."""

    path: str = Field(min_length=1)
    """A local folder in Hugging Face format, a hub id (`org/name`), or `builtin:tiny-llama`."""
    revision: Annotated[str, Field(min_length=1)] | None = None
    """The hub commit to take; pin it to make a run repeatable. A local folder has none."""
    dtype: Literal["auto"] | Dtype = "auto"
    """The type in which weights that are not quantized are written; `auto` keeps the source's."""
    base_model: str | None = None
    """The hub id (`org/name`) of this model for the model card, where `path` is a folder; null leaves it to
    what the folder says of itself."""

    @field_validator("base_model")
    @classmethod
    def _is_a_hub_id(cls, value: str | None) -> str | None:
        if value is not None and not is_hub_id(value):
            raise ValueError("base_model is a hub id such as org/name, not a path or a URL")
        return value


class BudgetSection(Section):
    """A target instead of a ratio: the run tries how many layers can go, and with how many bits."""

    bytes: str | None = None
    """Size of the weights, e.g. `4GB`: the run with the lowest perplexity that fits; or give
    `perplexity_increase`."""
    perplexity_increase: Annotated[str, Field(pattern=r"^\d{1,6}(\.\d{1,6})?\s*%$")] | None = None
    """How much `evaluate.perplexity` may rise over the source's, e.g. `5%`: the smallest such model."""
    bits: Annotated[list[GptqBits], Field(min_length=1)] | None = None
    """The bits among which GPTQ may choose, in the place of `quantize.bits`: 8, 4 and 3 unless either key
    says otherwise."""

    @model_validator(mode="after")
    def _one_target(self) -> "BudgetSection":
        if (self.bytes is None) == (self.perplexity_increase is None):
            raise ValueError("give either bytes or perplexity_increase")
        return self

    @field_validator("bytes")
    @classmethod
    def _is_a_size(cls, value: str | None) -> str | None:
        return value if value is None else _size(value)

    @property
    def increase(self) -> float:
        """The allowed rise of perplexity as a share of the source's."""
        return float((self.perplexity_increase or "0%").rstrip("% ")) / 100


class Recipe(Section):
    """A whole run: what goes in, what is done to it, what comes out.

    A setting that nothing would read is refused.
    """

    version: Literal[1]
    """Version of the recipe format."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Name of the run and of its folder."""
    model: ModelSection
    """The model to compress."""
    calibration: CalibrationSection = CalibrationSection()
    """The calibration tokens; only with `merge` or GPTQ."""
    merge: MergeSection | None = None
    """Layer merging, or null."""
    budget: BudgetSection | None = None
    """A size or a perplexity to meet, in the place of `merge.ratio` and `quantize.bits`, or null."""
    recover: LayerwiseSection | None = None
    """Tuning of the merged model, layer by layer, or null."""
    quantize: Annotated[QuantizeSection, Field(discriminator="method")] | None = None
    """Quantization, or null."""
    export: ExportSection = ExportSection()
    """The artifact's files."""
    evaluate: EvaluateSection | None = None
    """Measurements, or null."""

    @property
    def needs_calibration(self) -> bool:
        """Whether any stage of this recipe looks at calibration tokens."""
        return self.merge is not None or isinstance(self.quantize, GptqSection)

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        """Fills in the bits that a budget tries; a null that stands for a default goes."""
        if not isinstance(data, dict):
            return data
        data = {key: value for key, value in data.items() if (key, value) != ("calibration", None)}
        budget, quantize = data.get("budget"), data.get("quantize")
        if not (isinstance(budget, dict) and isinstance(quantize, dict) and quantize.get("method") == "gptq"):
            return data
        if quantize.get("bits") is None:
            bits = [8, 4, 3] if budget.get("bits") is None else budget["bits"]
            data["quantize"] = {key: value for key, value in quantize.items() if key != "bits"}
            data["budget"] = {**budget, "bits": bits}
        return data

    @model_validator(mode="after")
    def _calibrates_something(self) -> "Recipe":
        if "calibration" in self.model_fields_set and not self.needs_calibration:
            raise ValueError("nothing reads calibration: it is for merge and for GPTQ; leave it out")
        return self

    @model_validator(mode="after")
    def _bits_have_one_place(self) -> "Recipe":
        if self.budget is None or self.budget.bits is None:
            return self
        if not isinstance(self.quantize, GptqSection):
            raise ValueError("budget.bits is read with quantize.method: gptq only; leave it out")
        if "bits" in self.quantize.model_fields_set:
            raise ValueError("quantize.bits fixes what budget.bits leaves open: leave one of them out")
        return self

    @model_validator(mode="after")
    def _recovers_a_merge(self) -> "Recipe":
        if self.recover is not None and self.merge is None:
            raise ValueError("recover mends what merge did; with merge: null there is nothing to recover")
        return self

    @model_validator(mode="after")
    def _has_one_target(self) -> "Recipe":
        given = self.merge is not None and (self.merge.ratio is not None or self.merge.layers is not None)
        if self.budget is None:
            if self.merge is not None and not given:
                raise ValueError("merge needs ratio or layers, or the recipe a budget")
        elif given:
            raise ValueError("the budget says how much is merged: leave out merge.ratio and merge.layers")
        elif self.evaluate is None or self.evaluate.perplexity is None:
            raise ValueError("a budget is met by measuring: it needs evaluate.perplexity")
        return self

    def dump(self) -> dict[str, Any]:
        """The resolved recipe as plain data: defaults filled in, what nothing reads left out."""
        data = self.model_dump(mode="json")
        if not self.needs_calibration:
            del data["calibration"]
        if self.budget is not None and self.budget.bits is not None:
            del data["quantize"]["bits"]
        return data

    def to_yaml(self) -> str:
        """The resolved recipe as YAML."""
        return yaml.safe_dump(self.dump(), sort_keys=False, allow_unicode=True)
