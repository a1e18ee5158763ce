"""What a recipe may say: frozen models that forbid unknown keys; their docstrings are the help.

`recipe_file.load_recipe` reads one. The resolved recipe (defaults filled in) is what a run records;
reading it again gives the same recipe.
"""

from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mkaq.checkpoint.hub_id import is_hub_id
from mkaq.units import parse_size

Dtype = Literal["float32", "bfloat16", "float16"]
GptqBits = Literal[2, 3, 4, 8]
Dataset = Literal["builtin", "mmlu", "wikitext2", "text", "jsonl"]


NO_TEXT = "is no text: it holds half a surrogate pair, or was not UTF-8"


def _size(value: str) -> str:
    parse_size(value)
    return value


class _Model(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        if isinstance(value, str) and value.encode(errors="ignore").decode() != value:
            raise ValueError(NO_TEXT)
        return value


class ModelSection(_Model):
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


class TextSection(_Model):
    """Where text comes from and how much of it is read."""

    dataset: Dataset = "builtin"
    """`builtin` is English that every Python carries; the others read the file or folder in `path`."""
    path: str | None = None
    """A file or folder, for every dataset but `builtin`. Text may be compressed (.gz, .xz)."""

    @model_validator(mode="after")
    def _path_fits_dataset(self) -> "TextSection":
        if self.dataset == "builtin" and self.path is not None:
            raise ValueError("dataset builtin takes no path")
        if self.dataset != "builtin" and not self.path:
            raise ValueError(f"dataset {self.dataset} needs a path (a file or folder on this machine)")
        return self


class CalibrationSection(TextSection):
    """The tokens on which layers are compared and quantization errors are measured."""

    num_samples: int = Field(default=128, ge=1, le=65536)
    """How many sequences."""
    max_seq_length: int = Field(default=512, ge=8, le=131072)
    """Tokens per sequence."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Chooses the sequences, and the token positions at which layers are compared."""


class ManifoldSection(_Model):
    """The diffusion map of a layer's hidden states, and the bins in which its information is counted."""

    dimensions: int = Field(default=2, ge=1, le=4)
    """Diffusion coordinates kept."""
    points: int = Field(default=1024, ge=64, le=16384)
    """Token positions at which hidden states are compared, at most: no more than the calibration has."""
    bandwidth: Literal["median"] | Annotated[float, Field(gt=0)] = "median"
    """Width of the Gaussian kernel: the median pairwise distance, or a number."""
    alpha: float = Field(default=0.5, ge=0, le=1)
    """Density normalization: 0 none (graph Laplacian), 0.5 Fokker-Planck, 1 Laplace-Beltrami."""
    time: float = Field(default=1, ge=0, le=100)
    """Diffusion time: the power of the eigenvalues that scale the coordinates."""
    bins: int = Field(default=4, ge=2, le=32)
    """Equal-frequency bins per coordinate."""
    bias_correction: Literal["miller_madow", "none"] = "miller_madow"
    """Correction of the plug-in entropies for the finite number of points."""


class ProtectSection(_Model):
    """Layers that no merge may touch."""

    first: int = Field(default=1, ge=0)
    """How many at the start."""
    last: int = Field(default=1, ge=0)
    """How many at the end."""


class MergeSection(_Model):
    """MKA: which layers are merged, and how (arXiv 2406.16330)."""

    method: Literal["mka"] = "mka"
    """The merging method."""
    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The share of the layers to remove (rounded to whole layers); or give `layers`, or a `budget`."""
    layers: Annotated[int, Field(ge=1)] | None = None
    """How many layers to remove; or give `ratio`."""
    order: Literal["similarity", "back_to_front", "measured"] = "similarity"
    """`similarity` merges the most similar neighbours first; `back_to_front` is the paper's order;
    `measured` tries every group of neighbours and takes the cheapest cut of the whole model."""
    fuse: Literal["average", "channels"] = "average"
    """`average` is the paper's weighted mean of every tensor; `channels` keeps the attention heads and
    MLP channels that matter and solves what they write, so that the original hidden states come back."""
    coefficient: Literal["similarity", "sigmoid", "measured"] | Annotated[float, Field(ge=0, le=1)] | None = (
        None
    )
    """Weight of the earlier layer in an average: its similarity (unless said otherwise), the sigmoid of it
    (the published script), the best of 0.5 to 1 by what it does to the hidden states, or a number. Null with
    `fuse: channels`, which has no such weight."""
    manifold: ManifoldSection | None = None
    """How layers are compared. Null where nothing compares them: with `order: measured`, unless the
    coefficient is `similarity` or `sigmoid`."""
    protect: ProtectSection = ProtectSection()
    """Layers left alone."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        """Fills in the coefficient and the manifold where they are read, and only there."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        if data.get("fuse", "average") == "average" and data.get("coefficient") is None:
            data["coefficient"] = "similarity"
        compared = data.get("coefficient") in ("similarity", "sigmoid")
        if data.get("manifold") is None and (data.get("order") != "measured" or compared):
            data["manifold"] = {}
        return data

    @model_validator(mode="after")
    def _obeyed(self) -> "MergeSection":
        if self.ratio is not None and self.layers is not None:
            raise ValueError("give either ratio or layers")
        if self.fuse == "channels" and self.coefficient is not None:
            raise ValueError("coefficient is read with fuse: average only; leave it out")
        compared = self.order != "measured" or self.coefficient in ("similarity", "sigmoid")
        if self.manifold is not None and not compared:
            raise ValueError(
                "manifold is read with order: similarity or back_to_front, or an average by coefficient: "
                "similarity or sigmoid; leave it out"
            )
        return self


class LayerwiseSection(_Model):
    """Recovery without the whole model: every layer is tuned alone toward the original hidden states."""

    method: Literal["layerwise"]
    """Knowledge distillation, layer by layer."""
    steps: int = Field(default=100, ge=1, le=100_000)
    """Optimizer steps for each layer."""
    learning_rate: Literal["auto"] | Annotated[float, Field(gt=0, lt=1)] = "auto"
    """Of AdamW, falling to 0 along a cosine; `auto` is 0.25 / hidden_size."""
    batch_size: int = Field(default=32, ge=1, le=4096)
    """Sequences per step, at most: no more than there are to learn from."""


class GptqSection(_Model):
    """GPTQ with mkaq's own solver (arXiv 2210.17323)."""

    method: Literal["gptq"]
    """Weight-only quantization that corrects its own rounding on the calibration tokens."""
    bits: GptqBits = 4
    """Bits per weight. With a `budget`: the only ones tried; leave it out to try those of `budget.bits`."""
    group_size: Literal[-1, 16, 32, 64, 128, 256, 512, 1024] = 128
    """Weights of one row that share a scale; -1 is the whole row."""
    sym: bool = True
    """Symmetric: the zero point is the middle of the range. Most runtimes need it."""
    desc_act: bool = False
    """Solve the columns in order of falling activation, the most used first."""
    static_groups: bool = False
    """Fix every group's scale before solving, so that a group is `group_size` neighbouring columns
    whatever the order: with `desc_act` the checkpoint's `g_idx` is then trivial and kernels stay fast."""
    target: Literal["input", "source"] = "input"
    """What rounding is corrected toward: the hidden states of the model that is quantized (`input`, plain
    GPTQ), or those of the model that came in, so that it also mends what merging left (`source`)."""
    damp_percent: float = Field(default=0.01, gt=0, lt=1)
    """Share of the Hessian's mean diagonal that is added to its diagonal; raised where needed."""

    @property
    def scattered(self) -> bool:
        """Whether the columns of a group lie apart, so that a runtime has to look `g_idx` up."""
        return self.desc_act and not self.static_groups and self.group_size != -1


class BitsandbytesSection(_Model):
    """bitsandbytes int8 (arXiv 2208.07339) or 4-bit (arXiv 2305.14314), through the library."""

    method: Literal["bitsandbytes"]
    """Quantization without calibration."""
    bits: Literal[4, 8] = 4
    """4 (nf4 or fp4) or 8 (int8)."""
    quant_type: Literal["nf4", "fp4"] | None = None
    """The 4-bit code; nf4 unless said otherwise."""
    double_quant: bool | None = None
    """Quantize the scales of the 4-bit codes too (0.4 bits per weight less); on unless said otherwise."""
    compute_dtype: Literal["auto"] | Dtype | None = None
    """The type in which 4-bit layers are multiplied; `auto` is the checkpoint's."""

    @model_validator(mode="before")
    @classmethod
    def _four_bit_options(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        options = {"quant_type": "nf4", "double_quant": True, "compute_dtype": "auto"}
        if data.get("bits", 4) == 4:
            return {**data, **{key: value for key, value in options.items() if data.get(key) is None}}
        if given := [key for key in options if data.get(key) is not None]:
            raise ValueError(f"{', '.join(given)} only with bits: 4")
        return data


class ExportSection(_Model):
    """The artifact's files."""

    formats: list[Literal["safetensors"]] = Field(default=["safetensors"], min_length=1)
    """Formats to write."""
    shard_size: str = "4GB"
    """Largest size of one weight file, e.g. `500MB` or `4GB`; a single larger tensor gets its own file."""

    @field_validator("shard_size")
    @classmethod
    def _is_a_size(cls, value: str) -> str:
        return _size(value)


class PerplexitySection(TextSection):
    """Perplexity per token over consecutive sequences of a text."""

    num_samples: Annotated[int, Field(ge=1)] | None = None
    """At most this many sequences; null reads the whole text."""
    max_seq_length: int = Field(default=512, ge=8, le=131072)
    """Tokens per sequence."""


class EvaluateSection(_Model):
    """What is measured on the source and after each stage."""

    perplexity: PerplexitySection | None = None
    """Perplexity, or null."""


class BudgetSection(_Model):
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


class Recipe(_Model):
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
    quantize: Annotated[GptqSection | BitsandbytesSection, Field(discriminator="method")] | None = None
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
