"""What is at a path: a folder, an archive, a table or files of rows; and the images there.

A table (.csv, .tsv, .jsonl, or .parquet without a column of images) has one row for each image below its folder, and
names its file, its class and what else is known of it; see `list_table`. A folder or an archive with a table in it is
read by it if an option names a column, and otherwise a notice says that the table is there.

A parquet file with a column of images, a folder of such files, or one that `datasets` has written with
`save_to_disk`, has one image in each row; see `list_rows`. A .tar archive, or several, holds the samples of a
WebDataset (`list_samples`), or what a folder holds.

A path with *, ? or braces, such as data/train-*.parquet or shards/{0000..0012}.tar, stands for several files. An
address, https://..., names one or several files by braces, which are downloaded first (`stores.download`);
hf:owner/name is a data set on the hub (`hub_files`).
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NoReturn

from latentflow.data.sources.embedded import list_rows
from latentflow.data.sources.hub_files import HUB_PREFIX, HubDataset, fetch_hub_files
from latentflow.data.sources.listed import ListedImages, list_files
from latentflow.data.sources.tabled import find_table, list_table, notice_table, read_table
from latentflow.data.sources.webdataset import TarSamples, list_samples
from latentflow.data.stores.arrow import ARROW_FILES, ArrowStore
from latentflow.data.stores.download import fetched, is_address
from latentflow.data.stores.files import FileStore, FolderStore, Listing, is_image, open_store
from latentflow.data.stores.layout import split_of
from latentflow.data.stores.patterns import braces_expanded, expanded, is_pattern
from latentflow.data.stores.tar import TAR_FILE, TarStore
from latentflow.data.table_options import TableOptions
from latentflow.data.tables.arrow_table import arrow_table
from latentflow.data.tables.table import first_few
from latentflow.data.tables.text_tables import is_text_table
from latentflow.errors import DataError

_STATE = "state.json"  # of `save_to_disk`: which files belong to the data set


def list_images(place: str | Path, options: TableOptions) -> ListedImages:
    """List the images at a path or an address; see `open_images` for what it may be.

    Raises:
        DataError: there are none, or `options` ask for what is not there.
        ArtifactError: a data set on the hub cannot be reached.
    """
    if str(place).startswith(HUB_PREFIX):
        return _list_hub(HubDataset.parse(str(place).removeprefix(HUB_PREFIX)), options)
    if is_address(str(place)):
        return _list_web(str(place), options)
    path = Path(place)
    if is_pattern(path):
        return _list_shards(path, expanded(path), options)
    if path.is_file() and is_text_table(path.name):
        store, name = FolderStore(path.parent), unicodedata.normalize("NFC", path.name)
        listing = store.listing()
        return list_table(store, listing, read_table(store, listing, name), options)
    if path.is_file() and _is_shard(path.name):
        return _list_shards(path, [path], options)
    store = open_store(path)
    listing = store.listing()
    if isinstance(store, FolderStore) and (files := _shards(path, listing)):
        return _list_shards(path, files, options)
    return _list_folder(store, listing, options)


def _list_hub(asked: HubDataset, options: TableOptions) -> ListedImages:
    folder, files = fetch_hub_files(asked)
    if not files:
        return list_images(folder, options)
    return _list_shards(folder / asked.source.repo.rpartition("/")[2], files, options)


def _list_web(address: str, options: TableOptions) -> ListedImages:
    """The images in files of the web, which are downloaded first."""
    plain = address.partition("?")[0]
    if not plain.lower().endswith((".zip", TAR_FILE, *ARROW_FILES)):
        raise DataError(f"{plain} cannot be read; give the address of .tar, .parquet or .zip files")
    files = fetched(braces_expanded(address))
    if len(files) == 1:
        return list_images(files[0], options)
    return _list_shards(files[0].with_name(plain.rpartition("/")[2]), files, options)


def _list_folder(store: FileStore, listing: Listing, options: TableOptions) -> ListedImages:
    """The images of a folder or an archive, by the table in it or else by its folders."""
    if options.asks_for_table:
        return list_table(store, listing, read_table(store, listing, find_table(store, listing)), options)
    listed = list_files(store, listing)
    notice_table(store, listing, listing.files)
    return listed


def _list_shards(path: Path, files: Sequence[Path], options: TableOptions) -> ListedImages:
    """The images in some files of rows or in some archives."""
    if all(_is_tar(file.name) for file in files):
        return _list_archives(TarStore(path, files), options)
    if strange := [file.name for file in files if not _is_arrow(file.name)]:
        raise DataError(
            f"{path} stands for {first_few(strange)}; it should stand for .parquet or .arrow files, or for .tar files"
        )
    store = ArrowStore(path, files)
    if store.image_columns():
        return list_rows(store, options)
    folder = FolderStore(files[0].parent)
    return list_table(folder, folder.listing(), arrow_table(store), options)


def _list_archives(store: TarStore, options: TableOptions) -> ListedImages:
    """The images in archives: those of samples, or else as in a folder."""
    listing = store.listing()
    samples = TarSamples(store, listing)
    listed = list_samples(store, samples, listing, options) if samples else None
    if listed is not None:
        return listed
    if store.doubled:
        raise DataError(f"{store.path}: two of its archives hold {store.doubled}; rename or remove one of them")
    return _list_folder(store, listing, options)


def _shards(path: Path, listing: Listing) -> list[Path]:
    """The files of a folder that holds a data set in rows or in archives and no images; empty for others.

    Raises:
        DataError: they are of several splits.
    """
    if any(map(is_image, listing.files)):
        return []
    names = sorted(filter(_is_arrow, listing.files)) or sorted(filter(_is_tar, listing.files))
    stated = [name for name in listing.files if PurePosixPath(name).name == _STATE]
    if names and stated:
        names = sorted(file for state in stated for file in _stated_files(path, state))
    splits = {split_of(name): name for name in reversed(names)}
    if len(splits) > 1:
        _refuse_splits(path, splits, whole_folders=bool(stated))
    return [path / name for name in names]


def _refuse_splits(path: Path, splits: dict[str, str], *, whole_folders: bool) -> NoReturn:
    """Name the splits, and how one of them is given; each comes with one of its files."""
    split = next((split for split in splits if split.lower().startswith("train")), max(splits))
    one = path / splits[split]
    if "/" in splits[split] and (whole_folders or split_of(one.parent.name)):
        one = one.parent
    elif "-" in one.name:
        one = one.with_name(f"{one.name.partition('-')[0]}-*{one.suffix}")
    some = first_few(sorted(filter(None, splits)))
    raise DataError(f"{path} holds the splits {some}: give one of them, such as {one}")


def _stated_files(path: Path, state: str) -> list[str]:
    """The files that belong to a data set that was saved with `save_to_disk`; its folder may hold others."""
    try:
        found = json.loads((path / state).read_text(encoding="utf-8"))["_data_files"]
        return [str(PurePosixPath(state).with_name(str(file["filename"]))) for file in found]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path / state} is damaged ({error}); save the data set again") from error


def _is_shard(name: str) -> bool:
    return _is_arrow(name) or _is_tar(name)


def _is_tar(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() == TAR_FILE


def _is_arrow(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in ARROW_FILES
