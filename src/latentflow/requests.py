"""Requests: a record of what a verb can be asked is its command line, its Python arguments and part of its result.

Nothing here, and nothing that a request imports, may import torch: `latentflow --help` has to be quick.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, cleandoc, signature
from numbers import Integral, Real
from textwrap import indent
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator, ConfigDict, SkipValidation, ValidationError
from pydantic.fields import FieldInfo

from latentflow.errors import ConfigError, nearest
from latentflow.records import Record, what_to_give

Split = Literal["all", "held-out", "training"]
"""Which of the images that a model was trained with."""


@dataclass(frozen=True)
class Option:
    """What the name and the type of a request's field do not say. Stands in the `Annotated` of the field.

    Attributes:
        name: on the command line, where it is not that of the field: "--map".
        argument: it is given by position, without a name.
        metavar: stands for the value in the help.
        called: what messages call the field in Python; None: by its name.
        remedy: ends the message about a value out of range.
        adapts: it names a model, and `--adapter` adds an adapter to the name.
    """

    name: str | None = None
    argument: bool = False
    metavar: str | None = None
    called: str | None = None
    remedy: str = ""
    adapts: bool = False


def markers_of(field: FieldInfo) -> list[object]:
    """All that stands in the `Annotated` of a field, inside of `X | None` as well."""

    def within(annotation: object) -> Iterator[object]:
        if get_origin(annotation) is Annotated:
            inner, *markers = get_args(annotation)
            yield from markers
            yield from within(inner)
        elif get_origin(annotation) in (Union, UnionType):
            for one in get_args(annotation):
                yield from within(one)

    return [*field.metadata, *within(field.annotation)]


def option_of(field: FieldInfo) -> Option:
    """The field's `Option`."""
    return next((one for one in markers_of(field) if isinstance(one, Option)), Option())


class RequestError(ConfigError):
    """A field of a request was refused.

    Attributes:
        field: its name in Python; "" for what no single field is to blame for.
        reason: the message without the name.
    """

    def __init__(self, field: str, reason: str, called: str | None = None):
        super().__init__(f"{called or field}{reason}")
        self.field, self.reason = field, reason


class Request(Record):
    """What a verb can be asked. Every field has a description, a range and a default, and is checked once.

    Raises:
        RequestError: in one line, for the first value that is refused.
    """

    model_config = ConfigDict(defer_build=True)  # help shows the fields of all requests, and checks none

    def __init__(self, **given: Any):
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise _refusal(type(self), error) from None


Method = TypeVar("Method", bound=Callable[..., Any])


def with_fields_of(request: type[Request], options: type) -> Callable[[Method], Method]:
    """A decorator for a method that takes fields of a request as **options: signature and docstring show all of them.

    So `help`, notebooks and editors that look at living objects know them; type checkers read `options`.

    Args:
        options: the TypedDict of `options: Unpack[...]`, with the types of the fields.
    """

    def shown(method: Method) -> Method:
        own = signature(method)
        named = [one for one in own.parameters.values() if one.kind is not Parameter.VAR_KEYWORD]
        hints, fields = get_type_hints(options), request.model_fields
        added = {
            name: Parameter(name, Parameter.KEYWORD_ONLY, default=field.get_default(), annotation=hints[name])
            for name, field in fields.items()
            if name not in own.parameters
        }
        method.__signature__ = own.replace(parameters=[*named, *added.values()])  # type: ignore[attr-defined]
        lines = [f"{name}: {_described(fields[name])}" for name in added]
        method.__doc__ = f"{cleandoc(method.__doc__ or '')}\n\nOptions:\n" + indent("\n".join(lines), "    ") + "\n"
        return method

    return shown


def _described(field: FieldInfo) -> str:
    """What a field means, with its range where it has one."""
    return " ".join(filter(None, [field.description, (span := range_text(field)) and f"({span})"]))


def _refusal(request: type[Request], error: ValidationError) -> RequestError:
    """The first thing that is wrong, in one line with its remedy."""
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        return RequestError("", f"unknown argument {name!r}; {nearest(name, request.model_fields)}")
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return RequestError(name, " is missing")
    reason = what_to_give(first)
    if not name:
        return RequestError("", reason)
    option, value = option_of(request.model_fields[name]), first["input"]
    wanted = _range_of(request.model_fields[name])
    shown = _shown(value, wanted and wanted[2])
    if wanted:
        low, high, kind = wanted
        reason = f"give a {kind} from {low} to {high}" if high else f"give a {kind} of at least {low}"
        return RequestError(name, f" {shown}: {reason}" + (option.remedy and f"; {option.remedy}"), option.called)
    separator = " " if reason.startswith("is ") else ": "
    return RequestError(name, f" {shown}{separator}{reason}", option.called)


def _shown(value: object, kind: str | None) -> str:
    """A value in a message, cut where it is long."""
    if isinstance(value, float) and kind == "number":
        return f"{value:g}"
    if isinstance(value, Real):
        return "of more than 40 digits" if 10**40 <= abs(value) < math.inf else str(value)  # type: ignore[operator]
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"of {len(text)} characters"


_MOST_SHOWN = 60


def _range_of(field: FieldInfo) -> tuple[str, str, str] | None:
    """Lowest and highest value of a number as text ("" for no highest), and what kind of number it is."""
    markers = markers_of(field)
    bounds = {name: getattr(one, name) for one in markers for name in ("ge", "le") if hasattr(one, name)}
    if "ge" not in bounds:
        return None
    kind = "whole number" if _whole in (getattr(one, "func", None) for one in markers) else "number"
    low, high = (
        format(bounds[name], "," if kind == "whole number" else "g") if name in bounds else "" for name in ("ge", "le")
    )
    return low, high, kind


_WIDEST_BOUND = 12  # characters; what is longer bounds the type, not the meaning


def range_text(field: FieldInfo) -> str:
    """The range of a number as the help shows it: "1 to 1,000"; "" where there is none."""
    wanted = _range_of(field)
    if wanted is None:
        return ""
    low, high, _ = wanted
    return f"{low} to {high}" if high and len(high) <= _WIDEST_BOUND else f"at least {low}"


def _whole(value: object) -> object:
    """Numbers of other libraries become Python's; a bool is no number."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError("is not a whole number")
    return int(value)


def _real(value: object) -> object:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError("is not a number")
    return float(value)


@dataclass(frozen=True)
class FromText:
    """How the command line's text becomes the value of a field that is no plain number or text; in its `Annotated`.

    Attributes:
        parse: raises ValueError, whose message follows the option and the text: "is not a list like ...".
        repeats: the option may be given several times; each text becomes a name and a value of a mapping.
    """

    parse: Callable[[str], Any]
    repeats: bool = False


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _classes(text: str) -> list[str]:
    """A list in CSV, where a name with a comma stands in quotes."""
    try:
        rows = list(csv.reader([text], skipinitialspace=True, strict=True))
    except csv.Error:
        raise ValueError("is not a list like cat,dog; a name with a comma stands in double quotes") from None
    return rows[0] if rows and rows[0] else [""]


def _named_value(text: str) -> tuple[str, str]:
    """The name and the value of "age=63"."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ValueError("is not a name and a value like age=63")
    return name.strip(), value.strip()


def _new_and_old(text: str) -> tuple[str, str]:
    """The two classes of "corgi=Pembroke"."""
    new, equals, old = map(str.strip, text.partition("="))
    if not (new and equals and old):
        raise ValueError("is not of the form NEW=OLD, such as corgi=Pembroke")
    return new, old


def _mapping(given: object) -> object:
    if given is not None and not (isinstance(given, Mapping) and all(isinstance(name, str) for name in given)):
        raise ValueError("give names with their values, like {'age': 63}")
    return given if given is None else dict(given)


def numbers_like(example: str, kind: type = float) -> Callable[[str], list[Any]]:
    """Reads a list of numbers with commas."""

    def parse(text: str) -> list[Any]:
        try:
            return [kind(part) for part in text.split(",") if part.strip()]
        except ValueError:
            raise ValueError(f"is not a list of numbers like {example}") from None

    return parse


def pair_like(example: str, kind: type = float, separator: str = ",") -> Callable[[str], tuple[Any, Any]]:
    """Reads two numbers."""

    def parse(text: str) -> tuple[Any, Any]:
        try:
            first, second = (kind(part) for part in text.split(separator))
        except ValueError:
            raise ValueError(f"is not two {'whole ' if kind is int else ''}numbers like {example}") from None
        return first, second

    return parse


def two_of(what: str) -> Callable[[Any], Any]:
    """Refuses all but a pair, or None."""

    def checked(value: Any) -> Any:
        if value is None:
            return None
        try:
            pair = tuple(value)
        except TypeError:
            pair = ()
        if len(pair) != 2 or isinstance(value, str):
            raise ValueError(f"give two {what}")
        return pair

    return checked


def _path_text(given: object) -> object:
    """Paths become text; what is no path is left to the check of the type."""
    return os.fspath(given) if isinstance(given, os.PathLike) else given


Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, BeforeValidator(_real)]
PathText = Annotated[str, BeforeValidator(_path_text)]
"""A path, or the name of something that is no file: a hub id, a built-in autoencoder, synthetic images."""
ModelText = Annotated[PathText, Option(argument=True, adapts=True)]
"""The name of a model, with an adapter or without; see `latentflow.model.adapter_name`."""
Names = Annotated[list[str], FromText(_names)]
Classes = Annotated[int | str | Sequence[int | str], SkipValidation, FromText(_classes)]
"""Classes as a person gives them: one, or a list of names or indices; see `Conditioning.class_indices`."""
Conditions = Annotated[
    dict[str, Any],
    BeforeValidator(_mapping),
    FromText(_named_value, repeats=True),
    Option(name="--condition", metavar="NAME=VALUE"),
]
"""Values of named conditions as a person gives them; see `latentflow.sampling.named_conditions`."""
ClassOrigins = Annotated[
    dict[str, str],
    BeforeValidator(_mapping),
    FromText(_new_and_old, repeats=True),
    Option(name="--class-from", metavar="NEW=OLD"),
]
"""New classes, each with the class of another model that it begins as."""
WholeNumbers = Annotated[list[Whole], FromText(numbers_like("4,8,16", int))]
Numbers = Annotated[list[Number], FromText(numbers_like("1,1.5,2"))]
Times = Annotated[
    tuple[Number, Number], BeforeValidator(two_of("numbers like 0.1,0.8")), FromText(pair_like("0.1,0.8"))
]
