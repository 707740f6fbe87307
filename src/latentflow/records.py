"""Checked records, the base of configs and of JSON files, and what pydantic has against one in a single line."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import Any, ClassVar, Union

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from latentflow.errors import nearest

_LONGEST_VALUE = 200


class Record(BaseModel):
    """A record that cannot be changed, and refuses unknown keys, NaN and infinity.

    Attributes:
        also_given: keys that a validator turns into fields, each with its type.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    also_given: ClassVar[Mapping[str, Any]] = {}


def explain(error: ValidationError, schema: type[BaseModel] | None = None) -> str:
    """The first complaint of pydantic in one line: the key, its value, and what is wrong with it.

    >>> class Training(Record):
    ...     steps: int
    >>> try:
    ...     Training(steps="many")
    ... except ValidationError as error:
    ...     explain(error)
    "steps = 'many': give a whole number"

    Args:
        schema: what was validated; with it an unknown key comes with the nearest valid one, and keys are named without
            the kinds of their sections, which pydantic adds.
    """
    first = error.errors()[0]
    message = what_to_give(first)
    if not first["loc"]:
        return message
    *path, last = (str(part) for part in first["loc"])
    shown, section = _follow(path, schema) if schema else (path, None)
    key = ".".join([*shown, last])
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}" + (f"; {nearest(last, section.model_fields)}" if section else "")
    if first["type"] == "missing":
        return f"{key} is missing"
    value = shorten(repr(first["input"]), _LONGEST_VALUE, placeholder=" ...")
    return f"{key} = {value}: {message}"


def what_to_give(complaint: ErrorDetails) -> str:
    """What a value should be, by the type of pydantic's complaint, whose own words are about its types."""
    form = _GIVE.get(complaint["type"])
    if form is None:
        return complaint["msg"].removeprefix("Value error, ")
    return form.format(**complaint.get("ctx", {}))


_GIVE = {
    "int_type": "give a whole number",
    "int_parsing": "give a whole number",
    "int_from_float": "give a whole number",
    "float_type": "give a number",
    "float_parsing": "give a number",
    "finite_number": "give a finite number",
    "greater_than_equal": "give at least {ge}",
    "greater_than": "give more than {gt}",
    "less_than_equal": "give at most {le}",
    "less_than": "give less than {lt}",
    "literal_error": "give {expected}",
    "list_type": "give a list",
    "missing": "a value is missing",
    "string_type": "give a text",
    "path_type": "give a path",
    "bool_type": "give True or False",
    "bool_parsing": "give True or False",
}


def _follow(path: Sequence[str], schema: type[BaseModel]) -> tuple[list[str], type[BaseModel]]:
    """Follow pydantic's `path` into nested sections: the keys a user writes, and the class of the last section.

    Where a section may be of several kinds, pydantic's path also names the kind, which is not a key.
    """
    shown: list[str] = []
    sections: tuple[type[BaseModel], ...] = (schema,)
    for part in path:
        if len(sections) > 1:
            sections = tuple(kind for kind in sections if default_kind(kind) == part) or sections[:1]
        else:
            shown.append(part)
            sections = sections_of(annotation_of(sections[0], part)) or sections
    return shown, sections[0]


def alternatives(annotation: Any) -> list[Any]:
    """The types that an annotation allows, unions taken apart."""
    if typing.get_origin(annotation) is typing.Annotated:
        return alternatives(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return [kind for one in typing.get_args(annotation) for kind in alternatives(one)]
    return [annotation]


def sections_of(annotation: Any) -> tuple[type[BaseModel], ...]:
    """The kinds of section that an annotation allows; none for a value."""
    return tuple(kind for kind in alternatives(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel))


def default_kind(schema: type[BaseModel]) -> str | None:
    """The `kind` that tells a section from the others that may stand in its place."""
    return schema.model_fields["kind"].default if "kind" in schema.model_fields else None


def annotation_of(schema: type[BaseModel], name: str) -> Any:
    """The annotation of a field, or of a key that the schema turns into fields; None: there is none."""
    field = schema.model_fields.get(name)
    return field.annotation if field else getattr(schema, "also_given", {}).get(name)
