"""How a person says which columns of a table of images are used."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from latentflow.columns import COLUMN_KINDS
from latentflow.errors import nearest
from latentflow.records import Record
from latentflow.requests import Names, Option


class TableFiles(Record):
    """How the rows of a table of images and their files pair up; nothing of it matters for images without one."""

    file_column: str | None = Field(
        None, description="Column that names the file of each image; otherwise found by its name and cells."
    )
    allow_missing: bool = Field(
        False, description="Leave out rows without a file and files without a row instead of refusing them."
    )

    @property
    def table(self) -> TableOptions:
        """The same for opening images."""
        names = TableOptions.model_fields.keys() & type(self).model_fields.keys()
        return TableOptions(**{name: getattr(self, name) for name in names})


class LabelledTable(TableFiles):
    """Which column of a table of images holds their classes."""

    label_column: str | None = Field(
        None,
        description="Column of a table that holds the class of each image; otherwise the one that is called label or "
        "class. The table: labels.csv, .tsv, .jsonl or .parquet, given as DATA or beside the images.",
    )


class TableOptions(LabelledTable):
    """Which columns of a table of images are used, and how."""

    columns: Annotated[Names, Option(metavar="NAME[=COLUMN][:KIND],...")] | None = Field(
        None,
        min_length=1,
        description="Columns to learn from besides, with their kinds: age:number,view:label,findings:labels; without a "
        "kind it follows from the cells. view=label gives the column label the name view.",
    )

    @property
    def known_classes(self) -> tuple[str, ...]:
        """Classes that are expected: without `label_column` the column that holds no others is taken."""
        return ()

    @property
    def takes_what_is_there(self) -> bool:
        """Whether some of `columns` may be missing from a table, but not all of them."""
        return False

    @property
    def asks_for_table(self) -> bool:
        """Whether images without a table cannot be meant."""
        return self.label_column is not None or self.columns is not None or self.file_column is not None

    @field_validator("columns")
    @classmethod
    def _check_columns(cls, columns: list[str] | None) -> list[str] | None:
        for one in columns or ():
            name, colon, kind = one.rpartition(":")
            if colon and kind not in COLUMN_KINDS:
                raise ValueError(f"unknown kind {kind!r} of {name!r}; {nearest(kind, COLUMN_KINDS)}")
        return columns


class TableOfModel(TableOptions):
    """Which columns are used of a table that a model is measured on."""

    class_names: tuple[str, ...] = ()
    partly: bool = False

    @property
    def known_classes(self) -> tuple[str, ...]:
        return self.class_names

    @property
    def takes_what_is_there(self) -> bool:
        return self.partly
