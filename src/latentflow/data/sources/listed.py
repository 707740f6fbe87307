"""A set of images that is listed and not decoded yet; and what the files of a folder or an archive are as one."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from latentflow.columns import Column, ColumnValue
from latentflow.data.sources.input_files import InputFiles
from latentflow.data.sources.maps import MapFiles
from latentflow.data.stores.files import SUFFIXES, FileStore, Listing, StoredFile, pictures_among, wrapper
from latentflow.data.stores.layout import class_folders, counted, notice_skipped, unread_pictures
from latentflow.errors import DataError


class ImageStore(Protocol):
    """What holds image files.

    Attributes:
        path: as the user gave it.
    """

    path: Path

    def read(self, path: str) -> bytes:
        """The content of one file."""
        ...

    def held_bytes(self, path: str) -> int:
        """Memory that reading a file takes, if it is known beforehand."""
        ...

    def contents(self, paths: Sequence[str]) -> list[str]:
        """Size and CRC-32 of each file, as "1234:89abcdef"."""
        ...


@dataclass(frozen=True)
class ListedImages:
    """n images in the order of their names, none of which is decoded yet.

    Attributes:
        store: what holds them.
        names: of the images, each once; what users, caches and models know them by.
        paths: where the store keeps each.
        class_names: one name per label.
        labels: [n] int32; None in an unlabelled set.
        maps: their semantic maps.
        columns: what is known of each image besides.
        values: of each column, its n values.
        inputs: their paired inputs.
    """

    store: ImageStore
    names: Sequence[str]
    paths: Sequence[str]
    class_names: tuple[str, ...] = ()
    labels: np.ndarray | None = None
    maps: MapFiles | None = None
    columns: tuple[Column, ...] = ()
    values: tuple[Sequence[ColumnValue], ...] = ()
    inputs: InputFiles | None = None


@dataclass(frozen=True)
class Layout:
    """The image files of a folder or an archive.

    Attributes:
        prefix: the folder that wraps all of them, with its trailing slash.
        images: by name, the prefix included, sorted.
        others: names of the other files.
        maps: every map by its path below masks/; empty without maps.
        inputs: every paired input by its path below inputs/; empty without inputs.
        images_folder: the folder images/ that maps and inputs belong to.
        classes: the file classes.json of the maps, if there is one.
    """

    prefix: str
    images: dict[str, StoredFile]
    others: list[str]
    maps: dict[str, StoredFile]
    inputs: dict[str, StoredFile]
    images_folder: str
    classes: StoredFile | None

    def open_maps(self, store: FileStore) -> MapFiles | None:
        """The maps of `images`; None if there are none.

        Raises:
            DataError: they have no classes.json, or do not pair up with the images.
        """
        return MapFiles(store, self.classes, self.maps, self._below_images) if self.maps else None

    def open_inputs(self, store: FileStore) -> InputFiles | None:
        """The paired inputs of `images`; None if there are none.

        Raises:
            DataError: they do not pair up with the images.
        """
        return InputFiles(store, self.inputs, self._below_images) if self.inputs else None

    @property
    def _below_images(self) -> list[str]:
        return [name.removeprefix(self.images_folder) for name in self.images]


def files_of_layout(store: FileStore, listing: Listing) -> Layout:
    """Find the images in a listing, and their maps and inputs if it is laid out as images/, masks/ and inputs/.

    Raises:
        DataError: there are no images.
    """
    files = listing.files
    # Separately, as arrays are only read where there are no other pictures.
    inputs = [name for name in files if "inputs" in name.split("/")[:-1]]
    found = [*pictures_among(set(files).difference(inputs)), *pictures_among(inputs)]
    images = {name: files[name] for name in sorted(found)}
    others = [name for name in files if name not in images]
    if not images:
        _refuse_environments(files, store.path)
        unread = _unread(store, files, others)
        some = f"; it has {len(files)} other files, such as {min(files)}" if files else ""
        some = f", but {unread}" if unread else some
        raise DataError(f"no images in {store.path}{some}; latentflow reads {', '.join(SUFFIXES)}")

    top = wrapper(images)
    parts = _parts(_below(top, images), store.path)
    has_maps = "masks" in parts
    if not has_maps and any(name.rpartition("/")[2] == "classes.json" for name in files):
        unread = _unread(store, files, others)
        raise DataError(
            f"{store.path} has a classes.json, but not images/ and masks/ with images in both"
            f"{f' that are read ({unread})' if unread else ''}; add what is missing, or remove classes.json"
        )
    folder = f"{top}images/" if parts else top
    prefix = folder + wrapper(_below(folder, images))
    own = {name: file for name, file in images.items() if name.startswith(prefix)}
    maps, paired = (_below(f"{top}{part}/", images) if part in parts else {} for part in ("masks", "inputs"))
    return Layout(prefix, own, others, maps, paired, folder, files.get(f"{top}classes.json"))


def list_files(store: FileStore, listing: Listing | None = None) -> ListedImages:
    """The images of a folder or an archive, as its folders say; see `open_images` for the layout.

    Args:
        listing: of the store, if it is known already.

    Raises:
        DataError: there are no images, or a layout whose labels or maps would be nonsense.
    """
    files, folders = listing = listing or store.listing()
    layout = files_of_layout(store, listing)
    prefix, has_maps = layout.prefix, bool(layout.maps)
    names = [name.removeprefix(prefix) for name in layout.images]
    class_names = class_folders(names, store.path, prefix, has_maps)
    unmapped = [] if layout.maps or layout.inputs else folders
    notice_skipped(layout.others, unmapped, class_names, prefix, store.path, lambda name: store.mark(files[name].path))
    maps, labels = layout.open_maps(store), None
    if class_names:
        label_of = {name: label for label, name in enumerate(class_names)}
        labels = np.array([label_of[name.partition("/")[0]] for name in names], np.int32)
    paths = [file.path for file in layout.images.values()]
    return ListedImages(store, names, paths, class_names, labels, maps, inputs=layout.open_inputs(store))


def _unread(store: FileStore, files: dict[str, StoredFile], others: Iterable[str]) -> str:
    """The files that hold pictures but are not read, counted by kind; "" for none."""
    unread = unread_pictures(others, lambda name: store.mark(files[name].path))
    return counted(unread) if unread else ""


def _refuse_environments(files: Iterable[str], path: Path) -> None:
    """Name the LMDB environments below a folder without images, or in an archive."""
    found = sorted(posixpath.dirname(name) or "." for name in files if posixpath.basename(name) == "data.mdb")
    if found:
        remedy = "unpack it and give one of them" if path.is_file() else f"give one of them, such as {path / found[0]}"
        raise DataError(f"{path} holds LMDB environments ({', '.join(found[:5])}), not images: {remedy}")


def _below(prefix: str, files: dict[str, StoredFile]) -> dict[str, StoredFile]:
    return {name[len(prefix) :]: file for name, file in files.items() if name.startswith(prefix)}


def _parts(names: Iterable[str], path: Path) -> set[str]:
    """What lies next to images/: "masks", "inputs", both, or neither."""
    tops = {name.partition("/")[0] for name in names}
    found = tops & {"masks", "inputs"}
    if "images" not in tops or not found:
        return set()
    if others := sorted(tops - found - {"images"}):
        part = min(found, key=("masks", "inputs").index)
        raise DataError(
            f"{path} has images/ and {part}/, and other images as well ({', '.join(others[:5])}): "
            f"move those elsewhere, or rename {part}/ if it is a class like the others"
        )
    return found
