"""Pages that explain a result: Jinja2 templates that become one HTML file each, with charts and pictures inside.

Every value is escaped. A page has no script and needs no other file.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from latentflow.pages.numbers import number, percent, whole


@dataclass(frozen=True)
class Table:
    """A table of texts, whose first column names the rows.

    Attributes:
        header: the names of the columns.
        rows: their cells.
        strong: the rows that stand out, by number.
        text: the columns that hold words instead of numbers.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: Collection[int] = ()
    text: Collection[int] = (0,)


@dataclass(frozen=True)
class Sheet:
    """A contact sheet with a label for each row and each column.

    Attributes:
        file: the PNG, in rows of `num_columns` pictures; see `sampling.contact_sheet`. It becomes part of the page.
        alt: what it shows, for those who cannot see it.
        rows, columns: the labels, from the top and from the left; no columns for no labels above.
        marked: (row, column) of the pictures to frame.
    """

    file: Path
    alt: str
    rows: Sequence[str]
    num_columns: int
    columns: Sequence[str] = ()
    marked: Collection[tuple[int, int]] = ()

    @property
    def source(self) -> str:
        """The picture as a URL that holds its bytes."""
        return f"data:image/png;base64,{base64.b64encode(self.file.read_bytes()).decode()}"


def render(template: str, **values: Any) -> str:
    """A template of pages/templates filled with values; a value that is missing is an error."""
    text = _environment().get_template(template).render(values)
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("latentflow.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": number, "percent": percent, "whole": whole}
    return environment
