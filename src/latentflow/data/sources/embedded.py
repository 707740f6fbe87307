"""Images in the rows of a table: parquet with image bytes, and what the library `datasets` writes."""

from __future__ import annotations

import posixpath
import unicodedata
from collections.abc import Sequence

from latentflow.data.sources.listed import ListedImages
from latentflow.data.sources.tabled import Chosen, chosen
from latentflow.data.stores.arrow import ArrowStore
from latentflow.data.table_options import TableOptions
from latentflow.data.tables.arrow_table import arrow_table
from latentflow.data.tables.files_of_rows import FILE_COLUMNS
from latentflow.data.tables.table import ImageTable, first_few
from latentflow.errors import DataError, nearest

_USUAL = ("image", "img", "jpg", "png", "picture", "photo")


def list_rows(store: ArrowStore, options: TableOptions) -> ListedImages:
    """The images of a store, with the columns that `options` choose, in the order of their names.

    An image is called as the path that is stored with it, or else as another column names its file; a name without
    folders gets its class as one. So a data set that was made from class folders has their names. Where there are no
    such names, or two images have the same, images are called by the number of their row.

    Args:
        options: `file_column` is the column of the images, if there are several.

    Raises:
        DataError: it is not clear which column holds the images, or one that is asked for is not there.
    """
    column = _image_column(store, options.file_column)
    store.take_images(column)
    table = arrow_table(store, without=store.image_columns())
    found = chosen(table, options, "")
    names = _names(store, table, found)
    order = sorted(range(len(names)), key=names.__getitem__)
    return found.listed(store, [names[row] for row in order], [str(row) for row in order], order)


def _image_column(store: ArrowStore, asked: str | None) -> str:
    columns = store.image_columns()
    if asked is not None:
        if asked not in columns:
            raise DataError(f"{store.path}: --file-column {asked!r} holds no images; {nearest(asked, columns)}")
        return asked
    usual = [name for name in columns if name.lower() in _USUAL]
    if len(columns) > 1 and len(usual) != 1:
        raise DataError(f"{store.path} has images in {first_few(columns)}; name one of them with --file-column")
    return (usual if len(columns) > 1 else columns)[0]


def _names(store: ArrowStore, table: ImageTable, found: Chosen) -> list[str]:
    """The name of each row, each once."""
    paths: Sequence[object] = store.stored_paths()
    if not all(paths):
        column = next((name for name in table.cells if name.lower() in FILE_COLUMNS), None)
        paths = table.cells[column] if column else []
    names = [_clean(str(path)) for path in paths if path]
    if found.labels is not None:
        pairs = zip(names, found.labels, strict=False)
        names = [name if "/" in name else f"{_folder(found.class_names[label])}/{name}" for name, label in pairs]
    if len(names) == len(store) == len(set(names)):
        return names
    digits = len(str(len(store) - 1))
    return [f"{row:0{digits}}" for row in range(len(store))]


def _clean(path: str) -> str:
    """A path as a name: with forward slashes, below no folder."""
    text = unicodedata.normalize("NFC", path.replace("\\", "/"))
    return posixpath.normpath(f"/{text}").lstrip("/")


def _folder(class_name: str) -> str:
    return class_name.replace("/", "_")
