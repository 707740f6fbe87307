"""Tables in text files: .csv and .tsv with a header, and .jsonl with one object in each line."""

from __future__ import annotations

import csv
import io
import json
from pathlib import PurePosixPath

from latentflow.data.tables.table import ImageTable
from latentflow.errors import DataError

TEXT_TABLES = (".csv", ".tsv", ".jsonl")
_LONGEST_CELL = 1 << 24  # characters


def is_text_table(name: str) -> bool:
    """Whether a file is one of these, by its suffix."""
    return PurePosixPath(name).suffix.lower() in TEXT_TABLES


def read_text_table(content: bytes, name: str) -> ImageTable:
    """Read a table.

    Cells of .csv are parted by commas; by semicolons or tabs where the header has those and no comma. Those of .tsv are
    parted by tabs. Empty lines are skipped.

    Args:
        content: of the file; UTF-8.
        name: of the file, whose suffix says the format.

    Raises:
        DataError: it cannot be understood; the line is named.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{name}, line {line}: this is not UTF-8; save the table as UTF-8") from None
    if name.lower().endswith(".jsonl"):
        return _json_lines(text, name)
    header = text.partition("\n")[0]
    separator = "\t" if name.lower().endswith(".tsv") else next((mark for mark in ",;\t" if mark in header), ",")
    return _separated(text, name, separator)


def _separated(text: str, name: str, separator: str) -> ImageTable:
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows, lines = [], []
    try:
        header = [column.strip() for column in next(reader, [])]
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise DataError(
                    f"{name}, line {reader.line_num}: {len(row)} cells, but the header has {len(header)}; a cell with "
                    f"{separator!r} in it stands in double quotes"
                )
            rows.append(row)
            lines.append(reader.line_num)
    except csv.Error as error:
        raise DataError(f"{name}, line {reader.line_num}: {error}; save the table again") from None
    _check_header(header, name)
    if not rows:
        raise DataError(f"{name} has a header and no rows; it needs one for each image")
    return ImageTable(
        name, dict(zip(header, map(list, zip(*rows, strict=True)), strict=True)), lambda i: f"line {lines[i]}"
    )


def _check_header(header: list[str], name: str) -> None:
    if not any(header):
        raise DataError(f"{name} is empty; its first line names the columns, such as file,label")
    for place, column in enumerate(header):
        if not column:
            header[place] = f"column {place + 1}"
    if doubled := sorted({column for column in header if header.count(column) > 1}):
        raise DataError(f"{name}: two columns are called {doubled[0]!r}; rename one of them")


def _json_lines(text: str, name: str) -> ImageTable:
    rows, lines = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}, line {number}: this is not JSON ({error}); write one object per line") from None
        if not isinstance(row, dict):
            raise DataError(
                f'{name}, line {number}: this is no object; write one per line, such as {{"file": "a.png"}}'
            )
        rows.append(row)
        lines.append(number)
    if not rows:
        raise DataError(f"{name} has no rows; it needs one for each image")
    columns = dict.fromkeys(column for row in rows for column in row)
    cells = {column: [row.get(column) for row in rows] for column in columns}
    flat = {column: found for column, found in cells.items() if not any(isinstance(cell, dict) for cell in found)}
    return ImageTable(name, flat, lambda row: f"line {lines[row]}")
