"""A table of what is known of images: one row for each, and named columns.

A cell holds a text, a number, a truth value, a list of these, or None where nothing is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from latentflow.columns import COLUMN_KINDS, CONDITIONS_OF_IMAGES, Column, ColumnKind, ColumnValue, check_columns
from latentflow.console import notice
from latentflow.errors import DataError, nearest

SEPARATORS = "|;"
"""Either of them stands between the classes of a set, where the cell is a text."""

_NAMED = 5
_LABELS = ("label", "class", "labels", "category", "cls")
"""Columns that hold the class where nobody says which does; any case."""


class LazyCells(Mapping[str, Sequence[object]]):
    """Columns by name, each read when it is first asked for.

    Args:
        names: of the columns.
        read: the cells of one.
    """

    def __init__(self, names: Iterable[str], read: Callable[[str], Sequence[object]]):
        self._names, self._read = tuple(names), read
        self._known: dict[str, Sequence[object]] = {}

    def __getitem__(self, name: str) -> Sequence[object]:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._known:
            self._known[name] = self._read(name)
        return self._known[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class ImageTable:
    """n rows of cells.

    Attributes:
        name: the table's, for messages.
        cells: n cells of each column, by its name.
        place: where row i stands, for messages: "line 7".
        kinds: what the file itself says of columns.
        classes: the classes that the file itself lists, by column.
    """

    name: str
    cells: Mapping[str, Sequence[object]]
    place: Callable[[int], str] = lambda row: f"row {row}"
    kinds: Mapping[str, ColumnKind] = field(default_factory=dict)
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def column(self, name: str, option: str) -> Sequence[object]:
        """The cells of one column.

        Args:
            option: what asks for it, for the message.

        Raises:
            DataError: there is no such column; the nearest is named.
        """
        if name not in self.cells:
            raise DataError(f"{self.name} has no column {name!r}, which {option} names; {nearest(name, self.cells)}")
        return self.cells[name]

    def taken(self, rows: Sequence[int]) -> ImageTable:
        """These rows alone, in this order."""
        cells = LazyCells(self.cells, lambda name: [self.cells[name][row] for row in rows])
        return ImageTable(self.name, cells, lambda row: self.place(rows[row]), self.kinds, self.classes)


def label_column(
    table: ImageTable, asked: str | None, file: str = "", columns: Iterable[str] = (), known: Sequence[str] = ()
) -> str | None:
    """The column that holds the class of each image; None: there is none.

    Args:
        asked: its name; None: a column whose kind the table states as label, or one that is called so.
        file: the column that names the files.
        columns: those that are used in another way.
        known: classes that are expected; without `asked` the first column that holds no others is taken.

    Raises:
        DataError: there is no such column.
    """
    if asked is not None:
        table.column(asked, "--label-column")
        return asked
    columns = set(columns)
    free = [name for name in table.cells if name != file and name not in columns]
    if known and (holding := [name for name in free if _holds_only(table.cells[name], set(known))]):
        return holding[0]
    stated = [name for name in free if table.kinds.get(name) == "label" and name in table.classes]
    called = [name for usual in _LABELS for name in free if name.lower() == usual and name not in table.kinds]
    if len(stated) > 1:
        stated = [name for usual in _LABELS for name in stated if name.lower() == usual]
    found = next(iter(stated or called), None)
    if found is not None:
        notice(f"{table.name}: the classes are those of the column {found!r}; --label-column names another")
    elif free and not columns:
        some = first_few(free)
        notice(f"{table.name}: its columns are not used; --label-column or --columns take some of {some}")
    return found


def _holds_only(cells: Sequence[object], class_names: set[str]) -> bool:
    return all(_text(cell) in class_names for cell in cells)


def labels_of(table: ImageTable, name: str) -> tuple[tuple[str, ...], np.ndarray]:
    """The classes in a column, sorted by name as those of folders, and the label of each row, [n] int32.

    Raises:
        DataError: a cell is empty, or no single class.
    """
    texts = []
    for row, cell in enumerate(table.column(name, "--label-column")):
        text = _text(cell)
        if text is None or isinstance(cell, list | tuple):
            why = "is empty" if text is None else f"holds {cell!r}, which is not one class"
            asked = f"kind={name}" if name in CONDITIONS_OF_IMAGES else name
            remedy = f"{asked}:label" if text is None else f"{asked}:labels"
            raise DataError(
                f"{table.name}, {table.place(row)}: the column {name!r} {why}; fill it in, remove the row, or learn "
                f"from it as a column: --columns {remedy}"
            )
        texts.append(text)
    class_names = tuple(sorted(set(texts)))
    _notice_empty(table, name, class_names)
    index = {text: label for label, text in enumerate(class_names)}
    return class_names, np.array([index[text] for text in texts], np.int32)


def columns_of(table: ImageTable, wanted: Sequence[str]) -> tuple[tuple[Column, ...], tuple[list[ColumnValue], ...]]:
    """Columns of a table, and the values of each.

    Args:
        wanted: for each a name, or a name and a kind such as "age:number"; without one the kind follows from the cells:
            lists are labels, numbers are a number, everything else is a label. "view=label" renames a column.

    Raises:
        DataError: there is no such column or kind, one is asked for twice, or a cell does not fit.
    """
    found = [_column(table, one) for one in wanted]
    columns = tuple(column for column, _ in found)
    check_columns(columns)
    return columns, tuple(values for _, values in found)


def split_wanted(text: str) -> tuple[str, str, str | None]:
    """A column as it is asked for: the name it gets, its name in the table, and its kind if it is said.

    >>> split_wanted("age"), split_wanted("view=label:label")
    (("age", "age", None), ("view", "label", "label"))
    """
    names, colon, kind = text.rpartition(":")
    names, kind = (names, kind) if colon else (text, None)
    name, equals, own = names.partition("=")
    return name, own if equals else name, kind


def _column(table: ImageTable, wanted: str) -> tuple[Column, list[ColumnValue]]:
    called, name, kind = split_wanted(wanted)
    if kind is not None and kind not in COLUMN_KINDS:
        raise DataError(f"--columns {wanted}: unknown kind {kind!r}; {nearest(kind, COLUMN_KINDS)}")
    if called in CONDITIONS_OF_IMAGES:
        raise DataError(f"--columns {wanted}: a column cannot be called {called!r}; write --columns kind={wanted}")
    cells = table.column(name, "--columns")
    kind = kind or table.kinds.get(name) or _kind_of(cells)
    if kind == "number":
        return Column(called, kind), [_number(table, name, row, cell) for row, cell in enumerate(cells)]
    if kind == "label":
        texts = [_label(table, name, row, cell) for row, cell in enumerate(cells)]
        class_names = tuple(sorted({text for text in texts if text is not None}))
        _notice_empty(table, name, class_names)
        index = {text: label for label, text in enumerate(class_names)}
        return Column(called, kind, class_names), [None if text is None else index[text] for text in texts]
    sets = [_set(cell) for cell in cells]
    class_names = tuple(sorted({text for one in sets if one for text in one}))
    _notice_empty(table, name, class_names)
    index = {text: label for label, text in enumerate(class_names)}
    return Column(called, kind, class_names), [
        None if s is None else frozenset(index[text] for text in s) for s in sets
    ]


def _kind_of(cells: Sequence[object]) -> ColumnKind:
    known = [cell for cell in cells if _text(cell) is not None]
    if any(isinstance(cell, list | tuple) for cell in known):
        return "labels"
    return "number" if known and all(_as_number(cell) is not None for cell in known) else "label"


def _label(table: ImageTable, name: str, row: int, cell: object) -> str | None:
    if isinstance(cell, list | tuple):
        raise DataError(
            f"{table.name}, {table.place(row)}: the column {name!r} holds {list(cell)!r}, which is not one class; ask "
            "for the kind labels"
        )
    return _text(cell)


def _number(table: ImageTable, name: str, row: int, cell: object) -> float | None:
    if _text(cell) is None:
        return None
    value = _as_number(cell)
    if value is None or math.isinf(value):
        raise DataError(
            f"{table.name}, {table.place(row)}: the column {name!r} holds {cell!r}, which is not a finite number; "
            f"correct it, leave the cell empty where it is not known, or ask for the kind label"
        )
    return None if math.isnan(value) else value


def _as_number(cell: object) -> float | None:
    """A cell as a number; None if it is none."""
    if isinstance(cell, bool) or not isinstance(cell, int | float | str):
        return None
    try:
        return float(cell)
    except (ValueError, OverflowError):
        return None


def _text(cell: object) -> str | None:
    """A cell as a person would write it; None where nothing is known."""
    if isinstance(cell, bool):
        return "true" if cell else "false"
    if isinstance(cell, float):
        return None if math.isnan(cell) else str(int(cell)) if cell.is_integer() else repr(cell)
    return None if cell is None else str(cell).strip() or None


def _set(cell: object) -> set[str] | None:
    """The classes in a cell; an empty list is the empty set, and an empty text is not known."""
    if isinstance(cell, list | tuple):
        return {text for one in cell if (text := _text(one)) is not None}
    text = _text(cell)
    if text is None:
        return None
    for separator in SEPARATORS[1:]:
        text = text.replace(separator, SEPARATORS[0])
    return {part.strip() for part in text.split(SEPARATORS[0]) if part.strip()}


def _notice_empty(table: ImageTable, name: str, class_names: Sequence[str]) -> None:
    """Print which of the classes that the file lists have no image."""
    if empty := [one for one in table.classes.get(name, ()) if one not in set(class_names)]:
        notice(
            f"{table.name}: {len(empty)} classes of the column {name!r} have no image and are left out "
            f"({first_few(empty)})"
        )


def first_few(names: Iterable[str]) -> str:
    """The first few of some names, for messages."""
    names = list(names)
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
