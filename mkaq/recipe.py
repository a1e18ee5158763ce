"""The recipe: frozen models that forbid unknown keys; the docstrings of fields are the help text.

`recipe_file.load_recipe` reads one. A run records the resolved recipe (defaults filled in); reading that
gives the same recipe again.
"""

from typing import Annotated, Any, Literal

import yaml
from pydantic import Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mkaq.arch.arch import Arch
from mkaq.checkpoint.hub_id import is_hub_id
from mkaq.stages.base import Dtype, Section
from mkaq.stages.calibrate import CalibrationSection
from mkaq.stages.distill import DistillSection
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
    """Hub commit; pin it to make a run repeatable. A local folder has none."""
    dtype: Literal["auto"] | Dtype = "auto"
    """Type in which weights that are not quantized are written; `auto` keeps the source's."""
    base_model: str | None = None
    """Hub id (`org/name`) of the model, for the model card, if `path` is a folder; null uses the id that the
    folder itself names."""

    @field_validator("base_model")
    @classmethod
    def _is_a_hub_id(cls, value: str | None) -> str | None:
        if value is not None and not is_hub_id(value):
            raise ValueError("base_model is a hub id such as org/name, not a path or a URL")
        return value


class BudgetSection(Section):
    """A target instead of a ratio: the run tries how many layers to remove, and how many bits to use."""

    bytes: str | None = None
    """Largest size of the weights, e.g. `4GB`; of the runs that fit, the one with the lowest perplexity is
    chosen. Or give `perplexity_increase`."""
    perplexity_increase: Annotated[str, Field(pattern=r"^\d{1,6}(\.\d{1,6})?\s*%$")] | None = None
    """Largest rise of `evaluate.perplexity` over the source's, e.g. `5%`; the smallest model within it is
    chosen. Or give `bytes`."""
    bits: Annotated[list[GptqBits], Field(min_length=1)] | None = None
    """The bits that GPTQ may use, instead of `quantize.bits`; 8, 4 and 3 if neither is given."""

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
        """The allowed rise of perplexity as a fraction of the source's."""
        return float((self.perplexity_increase or "0%").rstrip("% ")) / 100


RecoverSection = Annotated[LayerwiseSection | DistillSection, Field(discriminator="method")]
Recovery = Annotated[
    Annotated[RecoverSection, Tag("one")]
    | Annotated[list[RecoverSection], Field(min_length=1, max_length=2), Tag("several")],
    Discriminator(lambda given: "several" if isinstance(given, list) else "one"),
]


def fault_at(key: str, message: str) -> PydanticCustomError:
    """A fault of several keys, shown where one of them is."""
    return PydanticCustomError("fault_at", "{message}", {"key": key, "message": message})


class Recipe(Section):
    """A whole run: the model, what is done to it, and the output.

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
    """A target size or perplexity instead of `merge.ratio` and `quantize.bits`, or null."""
    recover: Recovery | None = None
    """Tuning of the merged model, or null: `layerwise`, `distill`, or a list of both. Left out, a merged
    model is tuned layer by layer."""
    quantize: Annotated[QuantizeSection, Field(discriminator="method")] | None = None
    """Quantization, or null."""
    export: ExportSection = ExportSection()
    """The files of the artifact."""
    evaluate: EvaluateSection | None = None
    """Measurements, or null."""
    targets: list[Literal["transformers", "vllm", "vllm-cpu", "onnx", "mlx", "openvino", "llama.cpp"]] = (
        Field(default=[])
    )
    """Runtimes that must run the artifact: a recipe whose artifact one of them would refuse is refused."""

    @property
    def needs_calibration(self) -> bool:
        """Whether any stage of this recipe reads calibration tokens."""
        return self.merge is not None or isinstance(self.quantize, GptqSection)

    @property
    def layerwise(self) -> LayerwiseSection | None:
        """The tuning of each layer alone."""
        return next((each for each in self._recoveries if isinstance(each, LayerwiseSection)), None)

    @property
    def distill(self) -> DistillSection | None:
        """The distillation."""
        return next((each for each in self._recoveries if isinstance(each, DistillSection)), None)

    @property
    def _recoveries(self) -> list[LayerwiseSection | DistillSection]:
        given = self.recover
        return [] if given is None else given if isinstance(given, list) else [given]

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        """Fills in the recovery of a merge and the bits that a budget tries; drops a null that stands for a
        default.
        """
        if not isinstance(data, dict):
            return data
        data = {key: value for key, value in data.items() if (key, value) != ("calibration", None)}
        if data.get("merge") is not None and "recover" not in data:
            data["recover"] = {"method": "layerwise"}
        budget, quantize = data.get("budget"), data.get("quantize")
        if not (isinstance(budget, dict) and isinstance(quantize, dict) and quantize.get("method") == "gptq"):
            return data
        if quantize.get("bits") is None:
            bits = [8, 4, 3] if budget.get("bits") is None else budget["bits"]
            data["quantize"] = {key: value for key, value in quantize.items() if key != "bits"}
            data["budget"] = {**budget, "bits": bits}
        return data

    @model_validator(mode="after")
    def _recovers_a_merge(self) -> "Recipe":
        if self.recover is not None and self.merge is None:
            raise fault_at(
                "recover", "recover mends what merge did; with merge: null there is nothing to recover"
            )
        methods = [each.method for each in self._recoveries]
        if methods not in ([], ["layerwise"], ["distill"], ["layerwise", "distill"]):
            raise fault_at("recover", "recover takes each method once, layerwise before distill")
        return self

    @model_validator(mode="after")
    def _calibrates_something(self) -> "Recipe":
        if "calibration" in self.model_fields_set and not self.needs_calibration:
            raise fault_at(
                "calibration", "nothing reads calibration: it is for merge and for GPTQ; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _bits_have_one_place(self) -> "Recipe":
        if self.budget is None or self.budget.bits is None:
            return self
        if not isinstance(self.quantize, GptqSection):
            raise fault_at("budget.bits", "budget.bits is read with quantize.method: gptq only; leave it out")
        if "bits" in self.quantize.model_fields_set:
            raise fault_at(
                "quantize.bits", "quantize.bits fixes what budget.bits leaves open: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _has_one_target(self) -> "Recipe":
        given = self.merge is not None and (self.merge.ratio is not None or self.merge.layers is not None)
        if self.budget is None:
            if self.merge is not None and not given:
                raise fault_at("merge", "merge needs ratio or layers, or the recipe a budget")
        elif given:
            raise fault_at(
                "budget", "the budget says how much is merged: leave out merge.ratio and merge.layers"
            )
        elif self.evaluate is None or self.evaluate.perplexity is None:
            raise fault_at("budget", "a budget is met by measuring: it needs evaluate.perplexity")
        return self

    def fitted(self, arch: Arch) -> "Recipe":
        """This recipe with the defaults that depend on the model's family."""
        return self.model_copy(update={"merge": self.merge.fitted(arch)}) if self.merge else self

    def dump(self) -> dict[str, Any]:
        """The resolved recipe as plain data: defaults filled in, unread settings left out."""
        data = self.model_dump(mode="json")
        if not self.needs_calibration:
            del data["calibration"]
        if self.budget is not None and self.budget.bits is not None:
            del data["quantize"]["bits"]
        return data

    def to_yaml(self) -> str:
        """The resolved recipe as YAML."""
        return yaml.safe_dump(self.dump(), sort_keys=False, allow_unicode=True)
