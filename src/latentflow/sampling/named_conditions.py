"""Values of named conditions, as a person gives them and as a network gets them.

A value belongs to a named column that the model was trained on. On the command line and in a text:

    kind      one value                   several, cycled over the images     not given
    label     lateral, or its index #1    frontal,lateral                     none
    labels    edema,nodule; "" for none   edema,nodule;effusion               none
    number    63                          20,40,60                            none

In Python a value may also be a name or an index, a set of them, a number or None; a list of such values is cycled over
the images. A list of names is one set for a column of labels.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence, Set
from numbers import Real
from typing import Any

from torch import Tensor

from latentflow.columns import ColumnValue
from latentflow.console import notice
from latentflow.data.column_tensors import rows_of
from latentflow.errors import ConfigError, nearest
from latentflow.model.class_names import class_index
from latentflow.model.conditioning import ColumnCondition, Conditioning
from latentflow.requests import RequestError

NamedValue = float | str | list[str] | None
"""The value of a condition for one image, as a drawing stores it: classes by their names."""

_NOT_GIVEN = ("none", "#none")
_MOST_SHOWN = 60


def resolve_conditions(
    conditioning: Conditioning, asked: Mapping[str, Any] | None, num_images: int
) -> dict[str, list[NamedValue]]:
    """The value of each named condition for each image; conditions that are not given for any image are left out.

    A number outside the range of the training data is announced.

    Raises:
        RequestError: there is no such condition, or a value is none of its values; the nearest one is named.
    """
    resolved = {}
    for name, given in (asked or {}).items():
        values = _values(_column(conditioning, name), given)
        every = [values[place % len(values)] for place in range(num_images)]
        if any(value is not None for value in every):
            resolved[name] = every
    return {one.name: resolved[one.name] for one in conditioning.columns if one.name in resolved}


def ends_of(
    conditioning: Conditioning, asked: Mapping[str, Any] | None, *, most: int
) -> dict[str, tuple[NamedValue, NamedValue]]:
    """The first and the last value of each named condition, for a picture or for pictures between two ends.

    Args:
        most: values that a condition may have, 1 or 2.

    Raises:
        RequestError: a condition has more, or is given at one end only; see also `resolve_conditions`.
    """
    ends = {}
    for name, given in (asked or {}).items():
        column = _column(conditioning, name)
        values = _values(column, given)
        if len(values) > most:
            allowed = "one value" if most == 1 else "one value, or two: from and to"
            raise _refusal(column, given, f"{len(values)} values; give {allowed}")
        if (values[0] is None) != (values[-1] is None):
            raise _refusal(column, given, "it is known at one end only; give it at both, or at none")
        if values[0] is not None:
            ends[name] = values[0], values[-1]
    return ends


def condition_rows(
    conditioning: Conditioning, conditions: Mapping[str, Sequence[NamedValue]], num: int
) -> Tensor | None:
    """The values of `num` images as a network gets them, [num, W] float32; None for a model without columns."""
    if not conditioning.columns:
        return None
    columns = [
        [_indexed(one, value) for value in conditions.get(one.name, [None] * num)] for one in conditioning.columns
    ]
    return rows_of([one.column for one in conditioning.columns], list(zip(*columns, strict=True)))


def named_value(class_names: Sequence[str], value: ColumnValue) -> NamedValue:
    """A value of a column of the data as a drawing stores it.

    Args:
        class_names: of this column; empty for numbers.
    """
    if isinstance(value, frozenset):
        return [class_names[index] for index in sorted(value)]
    if value is None or not class_names:
        return None if value is None else float(value)
    return class_names[int(value)]


def _indexed(column: ColumnCondition, value: NamedValue) -> ColumnValue:
    if isinstance(value, list):
        return frozenset(column.class_names.index(name) for name in value)
    return column.class_names.index(value) if isinstance(value, str) else value


def _column(conditioning: Conditioning, name: str) -> ColumnCondition:
    names = [one.name for one in conditioning.columns]
    if name in names:
        return conditioning.columns[names.index(name)]
    if name in conditioning.kinds:
        how = conditioning.kinds[name].remedy([])
        raise RequestError("conditions", f" {name}: this condition is not given by a value; {how}")
    own = nearest(name, names) if names else "this model has no named conditions"
    raise RequestError("conditions", f" {name}: the model was not trained with it; {own}")


def _values(column: ColumnCondition, given: Any) -> list[NamedValue]:
    """The values that are cycled over the images, at least one."""
    parts = _parts(column, given)
    if not parts:
        raise _refusal(column, given, "there is no value in it; give one, or 'none'")
    values = [_value(column, part, given) for part in parts]
    if column.kind == "number":
        _notice_outside(column, [value for value in values if isinstance(value, float)])
    return values


def _parts(column: ColumnCondition, given: Any) -> list[Any]:
    """What is given, one part for each image until they are cycled."""
    is_set = column.kind == "labels"
    if isinstance(given, str):
        if given in column.class_names:
            return [[given]] if is_set else [given]
        if is_set:
            return [_names(column, part) for part in given.split(";")]
        return _names(column, given)
    if not isinstance(given, list | tuple):
        return [given]
    if is_set and all(isinstance(one, str | int) for one in given):
        return [list(given)]
    return list(given)


def _names(column: ColumnCondition, text: str) -> list[str]:
    """Names in CSV: one with a comma stands in quotes."""
    try:
        rows = list(csv.reader([text], skipinitialspace=True, strict=True))
    except csv.Error:
        raise _refusal(column, text, "a name with a comma stands in double quotes") from None
    return [one.strip() for one in rows[0]] if rows else []


def _value(column: ColumnCondition, part: Any, given: Any) -> NamedValue:
    if part is None:
        return None
    if column.kind == "number":
        return _number(column, part, given)
    if column.kind == "label":
        return None if _is_none(column, part) else _class(column, part, given)
    members = sorted(part, key=str) if isinstance(part, Set) else part if isinstance(part, list | tuple) else [part]
    if len(members) == 1 and _is_none(column, members[0]):
        return None
    chosen = {_class(column, one, given) for one in members}
    return [name for name in column.class_names if name in chosen]


def _is_none(column: ColumnCondition, one: Any) -> bool:
    return isinstance(one, str) and one.lower() in _NOT_GIVEN and one not in column.class_names


def _number(column: ColumnCondition, part: Any, given: Any) -> float | None:
    if _is_none(column, part):
        return None
    try:
        number = float(part) if isinstance(part, str | Real) and not isinstance(part, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        between = "" if column.low is None else f", such as {column.mean:.3g}"
        raise _refusal(column, given, f"{part!r} is not a number; give a finite one{between}")
    return number


def _class(column: ColumnCondition, one: Any, given: Any) -> str:
    try:
        index = class_index(column.class_names, one)
    except ConfigError as error:
        raise _refusal(column, given, str(error)) from None
    if column.images_per_class and not column.images_per_class[index]:
        raise _refusal(column, given, f"no training image was of {column.class_names[index]!r}; give another")
    return column.class_names[index]


def _refusal(column: ColumnCondition, given: Any, why: str) -> RequestError:
    shown = str(given) if isinstance(given, str) else repr(given)
    shown = shown if len(shown) <= _MOST_SHOWN else f"{shown[:_MOST_SHOWN]}..."
    return RequestError("conditions", f" {column.name}={shown}: {why}")


def _notice_outside(column: ColumnCondition, numbers: Sequence[float]) -> None:
    """Announce numbers that no training image had."""
    if column.low is None or column.high is None:
        return
    outside = [number for number in numbers if not column.low <= number <= column.high]
    if outside:
        some = ", ".join(f"{number:g}" for number in dict.fromkeys(outside[:4]))
        notice(
            f"condition {column.name} = {some} lies outside {column.low:g} to {column.high:g}, the range of the "
            "training images: what is drawn is extrapolated, and may not follow it"
        )
