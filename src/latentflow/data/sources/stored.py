"""Images in files: of a folder or archive, with labels and maps, or of an LMDB environment."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import quote_from_bytes

from latentflow.columns import Column
from latentflow.data.items import ImageItem, ImageSource, fingerprint_of
from latentflow.data.packed import PackedText
from latentflow.data.pictures.colour import to_rgb
from latentflow.data.pictures.crop import center_crop, crop_map
from latentflow.data.pictures.decode import BrokenImage, open_image, reason, room_for
from latentflow.data.pictures.orientation import Photo, with_turn
from latentflow.data.sources.maps import MapFiles
from latentflow.data.stores.files import SUFFIXES, FolderStore, Listing, StoredFile, ZipStore, is_image, wrapper
from latentflow.data.stores.first import check_first, evenly
from latentflow.data.stores.layout import class_folders, counted, notice_skipped, unread_pictures
from latentflow.data.stores.lmdb import LmdbStore
from latentflow.errors import ConfigError, DataError

_PRINTABLE = bytes(sorted({*range(0x20, 0x7F)} - {ord("%")}))


class ImageFiles:
    """The images of a folder or an archive; see `open_images` for the layout and `ImageSource` for the attributes.

    Reading is safe from several threads, and from forked or spawned processes. With `first`, labels are those of the
    whole set.

    Args:
        listing: of the store, if it is known already.

    Raises:
        DataError: there are no images or fewer than `first`, or a layout whose labels or maps would be nonsense.
    """

    columns: tuple[Column, ...] = ()

    def __init__(
        self,
        store: FolderStore | ZipStore,
        image_size: int,
        first: int | None = None,
        *,
        listing: Listing | None = None,
    ):
        self.image_size = image_size
        self._store = store
        self._contents: PackedText | None = None
        files, folders = listing or store.listing()
        images = {name: file for name, file in files.items() if is_image(name)}

        def mark(name: str) -> bytes:
            return store.mark(files[name].path)

        if not images:
            _refuse_environments(files, store.path)
            unread = unread_pictures(files, mark)
            some = f"; it has {len(files)} other files, such as {min(files)}" if files else ""
            some = f", but {counted(unread)}" if unread else some
            raise DataError(f"no images in {store.path}{some}; latentflow reads {', '.join(SUFFIXES)}")

        top = wrapper(images)
        has_maps = _has_maps(_below(top, images), store.path)
        others = [name for name in files if name not in images]
        if not has_maps and any(name.rpartition("/")[2] == "classes.json" for name in files):
            unread = counted(unread_pictures(others, mark))
            raise DataError(
                f"{store.path} has a classes.json, but not images/ and masks/ with images in both"
                f"{f' that are read ({unread})' if unread else ''}; add what is missing, or remove classes.json"
            )
        folder = f"{top}images/" if has_maps else top
        prefix = folder + wrapper(_below(folder, images))
        names = sorted(_below(prefix, images))
        self.class_names = class_folders(names, store.path, prefix, has_maps)
        notice_skipped(others, [] if has_maps else folders, self.class_names, prefix, store.path, mark)
        self._label_of = {name: label for label, name in enumerate(self.class_names)}
        self._maps = None
        if has_maps:
            below_images = [prefix.removeprefix(folder) + name for name in names]
            self._maps = MapFiles(store, files.get(f"{top}classes.json"), _below(f"{top}masks/", images), below_images)
        check_first(first, len(names), store.path)
        self._num_available = len(names)
        self._rows: Sequence[int] = range(len(names))
        if first is not None:
            if first < len(self.class_names):
                raise DataError(f"first = {first} of {len(self.class_names)} classes; give one for each class, or more")
            self._rows = evenly([self._label(name) or 0 for name in names], first)
        self._names = PackedText(names[row] for row in self._rows)
        paths = PackedText(images[prefix + names[row]].path for row in self._rows)
        self._paths = self._names if paths == self._names else paths

    @property
    def place(self) -> Path:
        """Where the images are."""
        return self._store.path

    @property
    def map_class_names(self) -> tuple[str, ...]:
        return self._maps.classes.names if self._maps else ()

    @property
    def map_palette(self) -> tuple[tuple[int, int, int], ...]:
        return self._maps.classes.palette if self._maps else ()

    @property
    def description(self) -> str:
        classes = f" in {len(self.class_names)} classes" if self.class_names else ""
        maps = f" with semantic maps of {len(self.map_class_names)} classes" if self._maps else ""
        return f"{_how_many(self, self._num_available)}{classes}{maps} from {self._store.path.resolve().name}"

    def contents(self) -> Sequence[str]:
        """Size and CRC-32 of each image file, and name, size and CRC-32 of its map."""
        if self._contents is None:
            found = self._store.contents(self._paths)
            if self._maps:
                pairs = zip(found, self._maps.contents(self._rows), strict=True)
                found = [f"{image} {semantic_map}" for image, semantic_map in pairs]
            self._contents = PackedText(found)
        return self._contents

    def fingerprint(self) -> str:
        """A hash of names and contents, and of the maps' classes; equal for a folder and its zip archive."""
        return fingerprint_of(self, range(len(self)), repr(self._maps.classes) if self._maps else "")

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """The path of image `index` below the class folders' folder, without decoding it."""
        return self._names[_checked(index, self)]

    def __getitem__(self, index: int) -> ImageItem:
        """Decode image `index` and its map.

        Raises:
            BrokenImage: a file has vanished, is damaged, or is not an image; or the map does not fit.
            IndexError: `index` is not in [0, len).
        """
        name, path, semantic_map = self.name(index), self._paths[index], None
        with _decoding(name):
            with room_for(self._store.held_bytes(path)), open_image(self._store.read(path), name) as image:
                rgb, turn = with_turn(image, partial(to_rgb, name=name))
                pixels = center_crop(rgb, self.image_size)
            if self._maps:
                semantic_map = crop_map(
                    self._maps.read(self._rows[index], Photo(rgb.height, rgb.width, turn)), self.image_size
                )
        return ImageItem(pixels, self._label(name), name, semantic_map, 1 - min(rgb.size) / max(rgb.size))

    def label(self, index: int) -> int | None:
        """The label of image `index`, without decoding it."""
        return self._label(self.name(index))

    def values(self, index: int) -> tuple[()]:
        """There are no columns."""
        return ()

    def _label(self, name: str) -> int | None:
        return self._label_of[name.partition("/")[0]] if self.class_names else None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_contents": None}  # which worker processes do not need


class LmdbImages:
    """The images of an LMDB environment, unlabelled; see `stores.lmdb` for layouts and order.

    A name is the key, with bytes that are not printable ASCII, and "%", written as %xx.
    """

    class_names = map_class_names = map_palette = columns = ()

    def __init__(self, store: LmdbStore, image_size: int):
        self.image_size = image_size
        self._store = store

    @property
    def place(self) -> Path:
        """Where the images are."""
        return self._store.path

    @property
    def description(self) -> str:
        return f"{_how_many(self, self._store.num_entries)} from {self._store.path.resolve().name}"

    def contents(self) -> Sequence[str]:
        """See `LmdbStore.contents`."""
        return self._store.contents()

    def fingerprint(self) -> str:
        """A hash of keys and values."""
        return fingerprint_of(self, range(len(self)))

    def label(self, index: int) -> None:
        """There are no labels."""

    def values(self, index: int) -> tuple[()]:
        """There are no columns."""
        return ()

    def __len__(self) -> int:
        return len(self._store.keys)

    def name(self, index: int) -> str:
        """The key of image `index` as text, without decoding it."""
        return quote_from_bytes(self._store.keys[_checked(index, self)], safe=_PRINTABLE)

    def __getitem__(self, index: int) -> ImageItem:
        """Decode image `index`; raises what `ImageFiles` raises."""
        name = self.name(index)
        with _decoding(name), open_image(self._store.read(self._store.keys[index]), name) as image:
            rgb = to_rgb(image, name)
            pixels = center_crop(rgb, self.image_size)
        return ImageItem(pixels, None, name, cut=1 - min(rgb.size) / max(rgb.size))


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turn any exception into `BrokenImage` of `name`."""
    try:
        yield
    except (BrokenImage, ConfigError):
        raise
    except Exception as error:  # damaged archives raise nearly anything
        raise BrokenImage(name, reason(error)) from error


def _checked(index: int, source: ImageSource) -> int:
    if not 0 <= index < len(source):
        raise IndexError(f"image {index} of a source of {len(source)}")
    return index


def _how_many(source: ImageSource, available: int) -> str:
    return f"{len(source)} images" if len(source) == available else f"first {len(source)} of {available} images"


def _refuse_environments(files: Iterable[str], path: Path) -> None:
    """Name the LMDB environments below a folder without images, or in an archive."""
    found = sorted(posixpath.dirname(name) or "." for name in files if posixpath.basename(name) == "data.mdb")
    if found:
        remedy = "unpack it and give one of them" if path.is_file() else f"give one of them, such as {path / found[0]}"
        raise DataError(f"{path} holds LMDB environments ({', '.join(found[:5])}), not images: {remedy}")


def _below(prefix: str, files: dict[str, StoredFile]) -> dict[str, StoredFile]:
    return {name[len(prefix) :]: file for name, file in files.items() if name.startswith(prefix)}


def _has_maps(names: Iterable[str], path: Path) -> bool:
    """Whether the files are laid out as images/ and masks/."""
    tops = {name.partition("/")[0] for name in names}
    if not tops >= {"images", "masks"}:
        return False
    if others := sorted(tops - {"images", "masks"}):
        raise DataError(
            f"{path} has images/ and masks/, and other images as well ({', '.join(others[:5])}): "
            "move those elsewhere, or rename masks/ if it is a class like the others"
        )
    return True
