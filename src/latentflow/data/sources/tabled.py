"""Images that a table describes: their files lie next to it, in the same folder or archive."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from latentflow.columns import Column, ColumnValue
from latentflow.console import notice
from latentflow.data.sources.listed import ImageStore, ListedImages, files_of_layout
from latentflow.data.sources.maps import MapFiles
from latentflow.data.stores.arrow import ArrowStore
from latentflow.data.stores.files import FileStore, FolderStore, Listing
from latentflow.data.table_options import TableOptions
from latentflow.data.tables.arrow_table import arrow_table
from latentflow.data.tables.files_of_rows import FileNames, file_column, files_of_rows
from latentflow.data.tables.table import ImageTable, columns_of, first_few, label_column, labels_of, split_wanted
from latentflow.data.tables.text_tables import TEXT_TABLES, is_text_table, read_text_table
from latentflow.errors import DataError

_TABLES = (*TEXT_TABLES, ".parquet")


@dataclass(frozen=True)
class Chosen:
    """What is used of a table's n rows: their classes and their columns; see `ListedImages`."""

    class_names: tuple[str, ...]
    labels: np.ndarray | None
    columns: tuple[Column, ...]
    values: tuple[list[ColumnValue], ...]

    def listed(
        self,
        store: ImageStore,
        names: Sequence[str],
        paths: Sequence[str],
        rows: Sequence[int],
        maps: MapFiles | None = None,
    ) -> ListedImages:
        """Images, of which image i stands in row `rows[i]`."""
        labels = None if self.labels is None else self.labels[rows]
        values = tuple([own[row] for row in rows] for own in self.values)
        return ListedImages(store, names, paths, self.class_names, labels, maps, self.columns, values)


def chosen(table: ImageTable, options: TableOptions, file: str) -> Chosen:
    """What `options` choose of a table whose files are in column `file`.

    Raises:
        DataError: see `columns_of` and `labels_of`.
    """
    wanted = options.columns or ()
    if options.takes_what_is_there:
        wanted = [one for one in wanted if split_wanted(one)[1] in table.cells] or wanted
    columns, values = columns_of(table, wanted)
    others = [split_wanted(one)[1] for one in wanted]
    label = label_column(table, options.label_column, file, others, options.known_classes)
    class_names, labels = labels_of(table, label) if label else ((), None)
    return Chosen(class_names, labels, columns, values)


def list_table(store: FileStore, listing: Listing, table: ImageTable, options: TableOptions) -> ListedImages:
    """The images that a table describes, with the columns that `options` choose.

    Images are in the order of their names, whatever the order of the rows, and have the names that they have without
    the table. So a table that names the classes that the folders have gives the same images and labels as the folders.

    Raises:
        DataError: the table cannot be read, or it and the files do not pair up.
    """
    layout = files_of_layout(store, listing)
    files = FileNames(layout.images)
    column = file_column(table, files, options.file_column)
    if column is None:
        raise DataError(
            f"{table.name} has no column that names the files; --file-column takes one of {first_few(table.cells)}"
        )
    rows, named = files_of_rows(table, column, files, allow_missing=options.allow_missing)
    needs_all = bool(layout.maps or layout.inputs)
    _check_nameless(table, layout.images, named, options.allow_missing, needs_all=needs_all)
    found = chosen(table.taken(rows), options, column)
    order = sorted(range(len(rows)), key=named.__getitem__)
    named = [named[place] for place in order]
    names, paths = [one.removeprefix(layout.prefix) for one in named], [layout.images[one].path for one in named]
    listed = found.listed(store, names, paths, order, layout.open_maps(store))
    return replace(listed, inputs=layout.open_inputs(store))


def read_table(store: FileStore, listing: Listing, name: str) -> ImageTable:
    """The table `name` of a folder or an archive.

    Raises:
        DataError: it cannot be read.
    """
    if name.lower().endswith(".parquet"):
        if not isinstance(store, FolderStore):
            raise DataError(f"{store.path}: {name} cannot be read inside of an archive; unpack it, and give the folder")
        return arrow_table(ArrowStore(store.path / name, [store.path / listing.files[name].path]))
    try:
        content = store.read(listing.files[name].path)
    except Exception as error:  # damaged archives raise nearly anything
        raise DataError(f"{store.path}: {name} cannot be read ({error}); copy it again") from error
    return read_text_table(content, f"{store.path}: {name}")


def find_table(store: FileStore, listing: Listing) -> str:
    """The one table of a folder or archive, the highest where there are tables below as well.

    Raises:
        DataError: there is none, or more than one.
    """
    tables = _tables(listing)
    if not tables:
        raise DataError(
            f"{store.path} has no table of its images ({', '.join(_TABLES)}), which --label-column, --columns and "
            "--file-column are about; put one beside them, or leave these options out"
        )
    if len(tables) > 1:
        raise DataError(f"{store.path} has {len(tables)} tables ({first_few(tables)}); give one of them as DATA")
    return tables[0]


def notice_table(store: FileStore, listing: Listing, images: Iterable[str]) -> None:
    """Print that a table lies beside images and how it is used, if there is one whose rows name some of them."""
    files = FileNames(images)
    for name in filter(is_text_table, _tables(listing)):
        start = store.mark(listing.files[name].path)
        try:
            table = read_text_table(start[: start.rfind(b"\n") + 1] or start, name)
        except DataError:
            continue
        column = file_column(table, files, None)
        if column is None or not any(files.matching(cell) for cell in table.cells[column]):
            continue
        others = [other for other in table.cells if other != column]
        if others:
            notice(
                f"{store.path}: {name} describes these images, and is not used; to learn from it add "
                f"--label-column {others[0]} or --columns {','.join(others[:3])} (it has {first_few(others)})"
            )


def _tables(listing: Listing) -> list[str]:
    """The tables of the highest folder that has some."""
    names = sorted(name for name in listing.files if name.lower().endswith(_TABLES))
    top = min((name.count("/") for name in names), default=0)
    return [name for name in names if name.count("/") == top]


def _check_nameless(
    table: ImageTable, images: Iterable[str], named: Sequence[str], allow_missing: bool, *, needs_all: bool
) -> None:
    """Refuse images that no row names, in the folders whose other images the table names; or print how many there are.

    Args:
        needs_all: whether images without a row cannot be left out.
    """
    known, folders = set(named), {_top(one) for one in named}
    left_out = sorted(one for one in images if one not in known and (needs_all or _top(one) in folders))
    if not left_out:
        return
    said = f"{len(left_out)} images have no row ({first_few(left_out)})"
    if needs_all or not allow_missing:
        remedy = "add the rows" if needs_all else "add the rows, or leave the images out with --allow-missing"
        raise DataError(f"{table.name}: {said}; {remedy}")
    notice(f"{table.name}: {said} and are left out")


def _top(name: str) -> str:
    return posixpath.dirname(name).partition("/")[0]
