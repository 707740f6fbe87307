"""Named columns of a data set: what is known of each image besides its class.

    kind     value of an image              not known
    label    the index of one class         None
    labels   a set of such indices          None; the empty set means that none of the classes applies
    number   a finite number                None

A source of images lists its columns and gives their values. A model that was trained on them takes each column as a
condition of its own, with the same name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, get_args

from latentflow.errors import DataError, nearest

ColumnKind = Literal["label", "labels", "number"]
COLUMN_KINDS: tuple[str, ...] = get_args(ColumnKind)

ColumnValue = int | frozenset[int] | float | None
"""The value of a column for one image, by its kind; None: not known."""

CONDITIONS_OF_IMAGES = ("label", "inpainting", "semantic_map", "input")
"""Conditions that are no columns, whose names a column cannot have."""

MOST_COLUMNS, MOST_CLASSES, MOST_SET_CLASSES, _LONGEST_NAME = 64, 1_000_000, 4096, 100
"""A set takes one number for each of its classes and image, so it has fewer of them."""


@dataclass(frozen=True)
class ColumnRow:
    """The value of a column as a network gets it: a row of `width` numbers.

        label    the index; not known: the number of classes
        labels   1 for each class of the set, else 0, and a last number that is 1 where the set is not known
        number   the number, and a last one that is 1 where it is not known

    Where a value is not known, the row is zero but for its last number, `null`.
    """

    kind: ColumnKind
    num_classes: int = 0

    @property
    def width(self) -> int:
        return {"label": 1, "labels": self.num_classes + 1, "number": 2}[self.kind]

    @property
    def null(self) -> int:
        """The last number of a row of which the value is not known."""
        return self.num_classes if self.kind == "label" else 1


def places_of(rows: Sequence[ColumnRow]) -> list[slice]:
    """Where each column stands in a row of all of them, one after the other."""
    ends = [0, *accumulate(row.width for row in rows)]
    return [slice(start, end) for start, end in pairwise(ends)]


@dataclass(frozen=True)
class Column:
    """A named column.

    Args:
        name: in recipes, requests and the metadata of pictures: printable, without "=", "," or spaces around it.
        kind: of its values.
        class_names: one name per class, for "label" and "labels".

    Raises:
        DataError: the name, the kind or the classes cannot be used; with the remedy.
    """

    name: str
    kind: ColumnKind
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if why := _unfit(self.name):
            raise DataError(f"a column named {self.name!r}: {why}; rename it")
        if self.kind not in COLUMN_KINDS:
            raise DataError(f"column {self.name}: unknown kind {self.kind!r}; {nearest(self.kind, COLUMN_KINDS)}")
        if self.kind == "number" and self.class_names:
            raise DataError(f"column {self.name}: a number has no classes; make it a label, or leave the classes out")
        if self.kind != "number":
            self._check_classes(MOST_CLASSES if self.kind == "label" else MOST_SET_CLASSES)

    def _check_classes(self, most: int) -> None:
        number = len(self.class_names)
        if not 1 <= number <= most:
            raise DataError(f"column {self.name}: {number:,} classes; a column of {self.kind} has 1 to {most:,}")
        if len(set(self.class_names)) < number:
            doubled = next(name for place, name in enumerate(self.class_names) if name in self.class_names[:place])
            raise DataError(f"column {self.name}: two classes are called {doubled!r}; give each a name of its own")

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for a number."""
        return len(self.class_names)

    @property
    def row(self) -> ColumnRow:
        """The shape of its values as a network gets them."""
        return ColumnRow(self.kind, self.num_classes)

    def check(self, value: ColumnValue, whose: str) -> None:
        """Refuse what is no value of this column.

        Args:
            whose: the image, for the message.

        Raises:
            DataError: naming image and value.
        """
        if value is None:
            return
        if self.kind == "number":
            fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        elif self.kind == "label":
            fits = _is_index(value, self.num_classes)
        else:
            fits = isinstance(value, frozenset) and all(_is_index(one, self.num_classes) for one in value)
        if not fits:
            wanted = {
                "number": "a finite number",
                "label": f"an index below {self.num_classes}",
                "labels": f"a frozenset of indices below {self.num_classes}",
            }[self.kind]
            raise DataError(f"{whose}: column {self.name} has the value {value!r}, which is not {wanted} or None")


def check_columns(columns: Sequence[Column]) -> None:
    """Refuse columns that cannot stand side by side.

    Raises:
        DataError: two have the same name, or there are too many.
    """
    names = [column.name for column in columns]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"two columns are called {doubled[0]!r}; rename one of them")
    if len(columns) > MOST_COLUMNS:
        raise DataError(f"{len(columns)} columns; at most {MOST_COLUMNS} can be used, choose some of them")


def written_values(values: Sequence[ColumnValue]) -> str:
    """The values of one image as text: equal for equal values, on every machine."""
    return " ".join(
        f"{{{','.join(map(str, sorted(value)))}}}" if isinstance(value, frozenset) else repr(value) for value in values
    )


def _unfit(name: str) -> str:
    """Why a column cannot have this name; "": it can."""
    if not name or name != name.strip() or not name.isprintable() or len(name) > _LONGEST_NAME:
        return f"a name has 1 to {_LONGEST_NAME} printable characters, without spaces around them"
    if "=" in name or "," in name:
        return "a name with '=' or ',' could not be given on the command line"
    if name in CONDITIONS_OF_IMAGES:
        return "this is the name of a condition that is no column"
    return ""


def _is_index(value: object, num_classes: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < num_classes
