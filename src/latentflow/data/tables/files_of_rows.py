"""Which file each row of a table names."""

from __future__ import annotations

import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence

from latentflow.console import notice
from latentflow.data.tables.table import ImageTable, first_few
from latentflow.errors import DataError

FILE_COLUMNS = ("file", "file_name", "filename", "path", "file_path", "filepath")
FILE_COLUMNS += ("image", "image_path", "image_name", "img")
"""Columns that name files, wherever they do; any case."""

_LOOKED_AT = 100  # cells of a column that is not called so


class FileNames:
    """Finds files by what a table says of them: the path below the table's folder, or the end of it, or either without
    its suffix.

    Args:
        names: of the files, with forward slashes.
    """

    def __init__(self, names: Iterable[str]):
        self._names = set(names)
        self._ends: dict[str, list[str]] = defaultdict(list)
        for name in self._names:
            last = posixpath.basename(name)
            for end in {last, posixpath.splitext(last)[0]}:
                self._ends[end].append(name)

    def matching(self, cell: object) -> list[str]:
        """The files that a cell may mean, sorted."""
        if isinstance(cell, bool | list | tuple) or cell is None:
            return []
        text = unicodedata.normalize("NFC", str(cell).strip()).replace("\\", "/")
        text = posixpath.normpath(text).lstrip("/") if text else ""
        if text in self._names:
            return [text]
        ends = self._ends.get(posixpath.basename(text), [])
        return sorted(name for name in ends if any(f"/{way}".endswith(f"/{text}") for way in (name, _stem(name))))


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def file_column(table: ImageTable, files: FileNames, asked: str | None) -> str | None:
    """The column that names the files: one that is called so, or else the first whose cells name some.

    Args:
        asked: its name, if it is known.

    Returns:
        None if there is no such column.

    Raises:
        DataError: there is no column `asked`.
    """
    if asked is not None:
        table.column(asked, "--file-column")
        return asked
    called = [name for usual in FILE_COLUMNS for name in table.cells if name.lower() == usual]
    for name in (*called, *(name for name in table.cells if name not in called)):
        if any(files.matching(cell) for cell in table.cells[name][:_LOOKED_AT]):
            return name
    return next(iter(called), None)


def files_of_rows(
    table: ImageTable, column: str, files: FileNames, *, allow_missing: bool
) -> tuple[list[int], list[str]]:
    """The rows whose file is there, and the file of each.

    Args:
        allow_missing: leave out the other rows, with a notice.

    Raises:
        DataError: a row names no file, or more than one, or two rows name the same.
    """
    rows, names, missing = [], [], []
    row_of: dict[str, int] = {}
    for row, cell in enumerate(table.column(column, "--file-column")):
        found = files.matching(cell)
        if len(found) > 1:
            raise DataError(
                f"{table.name}, {table.place(row)}: {cell} could be {first_few(found)}; write the path below the "
                "table's folder"
            )
        if not found:
            missing.append(row)
            continue
        other = row_of.setdefault(found[0], row)
        if other != row:
            raise DataError(
                f"{table.name}: {table.place(other)} and {table.place(row)} both name {found[0]}; remove one of them"
            )
        rows.append(row)
        names.append(found[0])
    if missing:
        _missing(table, column, missing, len(rows), allow_missing)
    return rows, names


def _missing(table: ImageTable, column: str, missing: Sequence[int], num_found: int, allow_missing: bool) -> None:
    cells = table.cells[column]
    listed = first_few(f"{cells[row] or 'nothing'} in {table.place(row)}" for row in missing)
    said = f"{len(missing)} rows name no file ({listed})"
    if not num_found:
        raise DataError(
            f"{table.name}: no row names a file in its column {column!r} ({first_few(map(str, cells))}); paths start "
            "at the table's folder, and --file-column takes another column"
        )
    if not allow_missing:
        raise DataError(f"{table.name}: {said}; correct or remove them, or leave them out with --allow-missing")
    notice(f"{table.name}: {said} and are left out")
