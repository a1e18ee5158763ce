"""The allowed keys and types of a recipe, read from its models."""

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from mkaq.recipe import Recipe


def known_keys(path: tuple[str, ...]) -> set[str]:
    """The key names of a section; empty if the path is not a section."""
    return {name for model in _sections_at(path) for name in model.model_fields}


def scalars_of(keys: tuple[str, ...]) -> set[Any]:
    """The types and literals that a key may hold, without constraints; empty if the key is unknown."""
    fields = [model.model_fields.get(keys[-1]) for model in _sections_at(keys[:-1])]
    return {kind for field in fields if field for kind in _alternatives(field.annotation)}


def _sections_at(path: tuple[str, ...]) -> list[type[BaseModel]]:
    """The possible models at a path: several if a key is a union."""
    models: list[type[BaseModel]] = [Recipe]
    for part in path:
        if part.isdigit():  # of a list
            continue
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        kinds = [kind for field in fields for kind in _alternatives(field.annotation, inside=True)]
        models = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return models


def _alternatives(annotation: Any, *, inside: bool = False) -> Iterator[Any]:
    """The types that an annotation stands for; with `inside` those in a list, too."""
    if get_origin(annotation) in (Union, UnionType):
        for inner in get_args(annotation):
            yield from _alternatives(inner, inside=inside)
    elif get_origin(annotation) is Annotated or (inside and get_origin(annotation) is list):
        yield from _alternatives(get_args(annotation)[0], inside=inside)
    else:
        yield annotation
