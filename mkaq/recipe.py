"""The recipe: YAML read into frozen models, every fault reported at once with its line and key.

`load_recipe` is the only way in. The resolved recipe (defaults filled in) is what a run
records; reading it again gives the same recipe.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mkaq.errors import MkaqError, UnsupportedError, UsageError
from mkaq.units import parse_size

Dtype = Literal["float32", "bfloat16", "float16"]
Dataset = Literal["builtin", "mmlu", "wikitext2", "text", "jsonl"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True)


class ModelSection(_Model):
    """The model to compress."""

    path: str = Field(min_length=1)
    """A local folder in Hugging Face format, a hub id (`org/name`), or `builtin:tiny-llama`."""
    revision: str | None = None
    """The hub commit to take; pin it to make a run repeatable."""
    dtype: Literal["auto"] | Dtype = "auto"
    """The type in which weights that are not quantized are written; `auto` keeps the source's."""


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
    """Token positions at which hidden states are compared."""
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
    """The share of the layers to remove (rounded to whole layers); or give `layers`."""
    layers: Annotated[int, Field(ge=1)] | None = None
    """How many layers to remove; or give `ratio`."""
    order: Literal["similarity", "back_to_front"] = "similarity"
    """`similarity` merges the most similar neighbours first; `back_to_front` is the paper's order."""
    fuse: Literal["average"] = "average"
    """`average` is the paper's weighted mean of every tensor."""
    coefficient: Literal["similarity", "sigmoid"] | Annotated[float, Field(ge=0, le=1)] = "similarity"
    """Weight of the earlier layer: its similarity, the sigmoid of it (the published script), or a number."""
    manifold: ManifoldSection = ManifoldSection()
    """How layers are compared."""
    protect: ProtectSection = ProtectSection()
    """Layers left alone."""

    @model_validator(mode="after")
    def _one_target(self) -> "MergeSection":
        if (self.ratio is None) == (self.layers is None):
            raise ValueError("give either ratio or layers")
        return self


class GptqSection(_Model):
    """GPTQ with mkaq's own solver (arXiv 2210.17323)."""

    method: Literal["gptq"]
    """Weight-only quantization that corrects its own rounding on the calibration tokens."""
    bits: Literal[2, 3, 4, 8] = 4
    """Bits per weight."""
    group_size: Literal[-1, 16, 32, 64, 128, 256, 512, 1024] = 128
    """Weights of one row that share a scale; -1 is the whole row."""
    sym: bool = True
    """Symmetric: the zero point is the middle of the range. Most runtimes need it."""
    desc_act: bool = False
    """Solve the columns in order of falling activation, the most used first."""
    static_groups: bool = False
    """Fix every group's scale before solving, so that a group is `group_size` neighbouring columns
    whatever the order: with `desc_act` the checkpoint's `g_idx` is then trivial and kernels stay fast."""
    damp_percent: float = Field(default=0.01, gt=0, lt=1)
    """Share of the Hessian's mean diagonal that is added to its diagonal; raised where needed."""


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
        parse_size(value)
        return value


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


class Recipe(_Model):
    """A whole run: what goes in, what is done to it, what comes out."""

    version: Literal[1]
    """Version of the recipe format."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Name of the run and of its folder."""
    model: ModelSection
    """The model to compress."""
    calibration: CalibrationSection = CalibrationSection()
    """The calibration tokens."""
    merge: MergeSection | None = None
    """Layer merging, or null."""
    recover: None = None
    """Reserved."""
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

    def dump(self) -> dict[str, Any]:
        """The resolved recipe as plain data, defaults filled in."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The resolved recipe as YAML."""
        return yaml.safe_dump(self.dump(), sort_keys=False, allow_unicode=True)


_LATER = {  # options that DESIGN names and this version does not have
    ("merge", "order"): ("measured",),
    ("merge", "fuse"): ("channels",),
    ("merge", "coefficient"): ("measured",),
}


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file, applies `KEY=VALUE` overrides, and checks the whole.

    Args:
        path: The YAML file.
        overrides: Dotted keys with YAML values, such as `merge.ratio=0.25`.

    Raises:
        UsageError: With every fault of the file, each with its line and key.
        UnsupportedError: If the only faults are options that this version does not have.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError("no such recipe", where=path, fix="`mkaq recipes` lists those that ship") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot be read: {error}", where=path) from None
    data, lines = _parse_yaml(text, path)
    for override in overrides:
        _apply(data, lines, override)
    faults, later = _faults(data)
    if not faults and not later:
        return Recipe.model_validate(data)
    raise _report(path, lines, faults, later)


def _parse_yaml(text: str, path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    """The file's data, and for each key path the place (`line N`) that sets it."""
    lines: dict[tuple[str, ...], str] = {}
    repeated: list[str] = []

    def visit(node: yaml.Node, at: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                here = (*at, str(key.value))
                place = f"line {key.start_mark.line + 1}"
                if key.value in seen:
                    repeated.append(f"  {place}, {'.'.join(here)}: given twice")
                seen.add(key.value)
                lines[here] = place
                visit(value, here)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                lines[(*at, str(index))] = f"line {value.start_mark.line + 1}"
                visit(value, (*at, str(index)))

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            visit(root, ())
        data = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UsageError(f"is not YAML: {' '.join(str(error).split())[:300]}", where=path) from None
    if repeated:
        raise UsageError("faults in the recipe:\n" + "\n".join(repeated), where=path)
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise UsageError("is not a mapping of recipe keys", where=path, fix="`mkaq schema` describes them")
    return data, lines


def _apply(data: dict[str, Any], lines: dict[tuple[str, ...], str], override: str) -> None:
    key, sign, value = override.partition("=")
    keys = tuple(key.strip().split("."))
    if not sign or not all(keys):
        raise UsageError(
            f"{override!r} is not KEY=VALUE", where="--set", fix="for example --set merge.ratio=0.25"
        )
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        parsed = value
    section = data
    for part in keys[:-1]:
        inner = section.get(part)
        if inner is None:
            inner = section[part] = {}
        if not isinstance(inner, dict):
            raise UsageError(f"{part} holds a value, not a section", where=f"--set {key}")
        section = inner
    section[keys[-1]] = parsed
    lines[keys] = f"--set {key}"


def _faults(data: dict[str, Any]) -> tuple[dict[tuple[str, ...], str], dict[tuple[str, ...], str]]:
    """Faults by key path, and apart from them options that only a later version has."""
    later: dict[tuple[str, ...], str] = {}
    for (section, key), values in _LATER.items():
        inner = data.get(section)
        if isinstance(inner, dict) and inner.get(key) in values:
            later[section, key] = f"{inner[key]!r} is not in this version"
    if data.get("recover") is not None:
        later[("recover",)] = "the recover stage is not in this version; set it to null"
    formats = data["export"].get("formats") if isinstance(data.get("export"), dict) else None
    if isinstance(formats, list) and (others := [f for f in formats if f in ("gguf", "mlx", "onnx")]):
        later["export", "formats"] = f"{', '.join(others)} not in this version; only safetensors"
    faults: dict[tuple[str, ...], str] = {}
    try:
        Recipe.model_validate(data)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            keys = _key_path(item["loc"], data, item["type"] in ("missing", "extra_forbidden"))
            if any(keys[: len(known)] == known for known in later):
                continue
            message = _message(item, keys)
            known_message = faults.get(keys)
            if known_message is None:
                faults[keys] = message
            elif message not in known_message:
                faults[keys] = f"{known_message}, or {message.partition(' (')[0]}"
    return faults, later


def _key_path(loc: tuple[int | str, ...], data: Any, last_is_key: bool) -> tuple[str, ...]:
    """pydantic's location without the union tags that it adds: the keys that the user wrote."""
    keys: list[str] = []
    for index, part in enumerate(loc):
        inside = dict(enumerate(data)) if isinstance(data, list) else data
        if isinstance(inside, dict) and part in inside:
            data = inside[part]
        elif not (last_is_key and index == len(loc) - 1):
            continue
        keys.append(str(part))
    return tuple(keys)


def _message(item: Any, keys: tuple[str, ...]) -> str:
    kind, given = item["type"], item.get("input")
    if kind == "extra_forbidden":
        known = sorted(_known_keys(keys[:-1]))
        near = difflib.get_close_matches(keys[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key ({hint})"
    if kind == "missing":
        return "is required"
    if kind == "literal_error":
        expected = item["ctx"]["expected"]
        options = re.findall(r"'([^']*)'", expected)
        near = difflib.get_close_matches(str(given), options, n=1)
        return f"must be {expected}, not {given!r}" + (f" (did you mean {near[0]!r}?)" if near else "")
    if kind == "value_error":
        return str(item["ctx"]["error"])
    if kind == "union_tag_invalid":
        return f"method must be one of {item['ctx']['expected_tags']}, not {item['ctx']['tag']!r}"
    if kind == "union_tag_not_found":
        return "method is required: gptq or bitsandbytes"
    if kind == "string_pattern_mismatch":
        return f"{given!r} may hold letters, digits, dots, dashes and underscores only"
    message = str(item["msg"])
    return f"{message[0].lower()}{message[1:]}" + (
        "" if isinstance(given, dict | list) else f", not {given!r}"
    )


def _sections(annotation: Any) -> Iterator[type[_Model]]:
    if isinstance(annotation, type) and issubclass(annotation, _Model):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, Annotated):
        for inner in get_args(annotation):
            yield from _sections(inner)


def _known_keys(path: tuple[str, ...]) -> set[str]:
    models: list[type[_Model]] = [Recipe]
    for part in path:
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        models = [section for field in fields for section in _sections(field.annotation)]
    return {name for model in models for name in model.model_fields}


def _report(
    path: Path,
    lines: dict[tuple[str, ...], str],
    faults: dict[tuple[str, ...], str],
    later: dict[tuple[str, ...], str],
) -> MkaqError:
    def place(keys: tuple[str, ...]) -> str:
        for end in range(len(keys), 0, -1):
            if keys[:end] in lines:
                return lines[keys[:end]]
        return next((at for inner, at in lines.items() if inner[: len(keys)] == keys), "line 1")

    everything = {**faults, **later}
    listed = sorted((place(keys), keys, text) for keys, text in everything.items())
    listed.sort(key=lambda row: int(row[0].split()[1]) if row[0].startswith("line") else 10**9)
    rows = [f"  {where}, {'.'.join(keys) or 'recipe'}: {text}" for where, keys, text in listed]
    count = f"{len(rows)} fault{'s' if len(rows) > 1 else ''}"
    kind = UsageError if faults else UnsupportedError
    return kind(
        f"{count} in the recipe:\n" + "\n".join(rows), where=path, fix="`mkaq schema` describes every key"
    )
