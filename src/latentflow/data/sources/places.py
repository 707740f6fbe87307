"""What is at a path: a folder, an archive, a table or files of rows; and the images there."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from latentflow.data.request import TableOptions
from latentflow.data.sources.embedded import list_rows
from latentflow.data.sources.listed import ListedImages, list_files
from latentflow.data.sources.tabled import find_table, list_table, notice_table, read_table
from latentflow.data.stores.arrow import ARROW_FILES, ArrowStore
from latentflow.data.stores.files import FolderStore, Listing, is_image, open_store
from latentflow.data.stores.layout import split_of
from latentflow.data.stores.patterns import expanded, is_pattern
from latentflow.data.tables.arrow_table import arrow_table
from latentflow.data.tables.table import first_few
from latentflow.data.tables.text_tables import is_text_table
from latentflow.errors import DataError

_STATE = "state.json"  # of `save_to_disk`: which files belong to the data set


def list_images(path: Path, options: TableOptions) -> ListedImages:
    """List the images at a path; see `open_images` for what it may be.

    Raises:
        DataError: there are none, or `options` ask for what is not there.
    """
    if is_pattern(path):
        return _list_files_of_rows(path, expanded(path), options)
    if path.is_file() and is_text_table(path.name):
        store, name = FolderStore(path.parent), unicodedata.normalize("NFC", path.name)
        listing = store.listing()
        return list_table(store, listing, read_table(store, listing, name), options)
    if path.is_file() and _is_arrow(path.name):
        return _list_files_of_rows(path, [path], options)
    store = open_store(path)
    listing = store.listing()
    if isinstance(store, FolderStore) and (files := _files_of_rows(path, listing)):
        return _list_files_of_rows(path, files, options)
    if options.asks_for_table:
        return list_table(store, listing, read_table(store, listing, find_table(store, listing)), options)
    listed = list_files(store, listing)
    notice_table(store, listing, listing.files)
    return listed


def _list_files_of_rows(path: Path, files: Sequence[Path], options: TableOptions) -> ListedImages:
    """The images in the rows of some files; or, where these hold none, the files that one of them names."""
    if strange := [file.name for file in files if not _is_arrow(file.name)]:
        raise DataError(f"{path} stands for {first_few(strange)}, not for {' or '.join(ARROW_FILES)} files")
    store = ArrowStore(path, files)
    if store.image_columns():
        return list_rows(store, options)
    folder = FolderStore(files[0].parent)
    return list_table(folder, folder.listing(), arrow_table(store), options)


def _files_of_rows(path: Path, listing: Listing) -> list[Path]:
    """The files of a folder that holds a data set in rows and no images; empty for others.

    Raises:
        DataError: they are of several splits.
    """
    names = sorted(filter(_is_arrow, listing.files))
    if not names or any(map(is_image, listing.files)):
        return []
    stated = [name for name in listing.files if PurePosixPath(name).name == _STATE]
    if stated:
        names = sorted(file for state in stated for file in _stated_files(path, state))
    splits = {split_of(name): name for name in reversed(names)}
    if len(splits) > 1:
        name = next((name for split, name in splits.items() if split.lower().startswith("train")), names[0])
        one = path / name
        if "/" in name and (stated or split_of(one.parent.name)):
            one = one.parent
        elif "-" in one.name:
            one = one.with_name(f"{one.name.partition('-')[0]}-*{one.suffix}")
        some = first_few(sorted(filter(None, splits)))
        raise DataError(f"{path} holds the splits {some}: give one of them, such as {one}")
    return [path / name for name in names]


def _stated_files(path: Path, state: str) -> list[str]:
    """The files that belong to a data set that was saved with `save_to_disk`; its folder may hold others."""
    try:
        found = json.loads((path / state).read_text(encoding="utf-8"))["_data_files"]
        return [str(PurePosixPath(state).with_name(str(file["filename"]))) for file in found]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path / state} is damaged ({error}); save the data set again") from error


def _is_arrow(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in ARROW_FILES
