"""Images in files: of a folder or archive, with labels and maps, or of an LMDB environment."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import quote_from_bytes

import numpy as np

from latentflow.columns import ColumnValue
from latentflow.data.items import FileFacts, ImageItem, ImageSource, fingerprint_of
from latentflow.data.packed import PackedText
from latentflow.data.painting.input_rules import FILES
from latentflow.data.pictures.crop import center_crop, crop_map, cut_by
from latentflow.data.pictures.decode import BrokenImage, reason, room_for
from latentflow.data.pictures.numbers import open_stored
from latentflow.data.pictures.orientation import Photo
from latentflow.data.pictures.reading import read_raster
from latentflow.data.sources.listed import ListedImages
from latentflow.data.stores.first import check_first, evenly
from latentflow.data.stores.lmdb import LmdbStore
from latentflow.errors import ConfigError, DataError
from latentflow.pixel_format import PixelFormat
from latentflow.sizes import Size

_PRINTABLE = bytes(sorted({*range(0x20, 0x7F)} - {ord("%")}))


class ImageFiles:
    """The images of a folder, an archive or a table; see `open_images` for the layouts and `ImageSource`.

    Reading is safe from several threads, and from forked or spawned processes. With `first`, labels are those of the
    whole set.

    Args:
        listed: the whole set.

    Raises:
        DataError: there are fewer than `first`.
    """

    def __init__(self, listed: ListedImages, image_size: Size, first: int | None = None):
        self.image_size, self.pixel_format = image_size, PixelFormat()
        self.class_names, self.columns = listed.class_names, listed.columns
        self._store, self._maps, self._labels = listed.store, listed.maps, listed.labels
        self._inputs, self._values = listed.inputs, listed.values
        self._contents: PackedText | None = None
        self._num_available = len(listed.names)
        check_first(first, self._num_available, listed.store.path)
        self._rows: Sequence[int] = range(self._num_available)
        if first is not None:
            if first < len(self.class_names):
                raise DataError(f"first = {first} of {len(self.class_names)} classes; give one for each class, or more")
            labels = [0] * self._num_available if listed.labels is None else listed.labels.tolist()
            self._rows = evenly(labels, first)
        self._names = PackedText(listed.names[row] for row in self._rows)
        paths = PackedText(listed.paths[row] for row in self._rows)
        self._paths = self._names if paths == self._names else paths

    @property
    def place(self) -> Path:
        """Where the images are."""
        return self._store.path

    @property
    def input_format(self) -> PixelFormat | None:
        return self._inputs.pixel_format if self._inputs else None

    @property
    def input_origin(self) -> str:
        return FILES if self._inputs else ""

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
        inputs = " with paired inputs" if self._inputs else ""
        where = self._store.path.resolve().name
        return f"{_how_many(self, self._num_available)}{classes}{maps}{inputs} from {where}"

    def contents(self) -> Sequence[str]:
        """Size and CRC-32 of each image file, its class where its name does not say it, and those of map and input."""
        if self._contents is None:
            found = self._store.contents(self._paths)
            if self.class_names:
                found = [f"{one}{self._unsaid_class(index)}" for index, one in enumerate(found)]
            for paired in filter(None, (self._maps, self._inputs)):
                found = [f"{one} {other}" for one, other in zip(found, paired.contents(self._rows), strict=True)]
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
        """Decode image `index`, its map and its input; raises what `cropped` raises."""
        return self.cropped(index, self.image_size)

    def cropped(self, index: int, size: Size) -> ImageItem:
        """Image `index`, its map and its input, at another size.


        Raises:
            BrokenImage: a file has vanished, is damaged, or is not an image; or the map or the input does not fit.
            IndexError: `index` is not in [0, len).
        """
        name, path, semantic_map, paired = self.name(index), self._paths[index], None, None
        with _decoding(name):
            with room_for(self._store.held_bytes(path)):
                picture, turn = read_raster(self._store.read(path), name, self.pixel_format)
                pixels = picture.cropped(partial(center_crop, size=size))
            if self._maps:
                width, height = picture.size
                semantic_map = crop_map(self._maps.read(self._rows[index], Photo(height, width, turn)), size)
            if self._inputs:
                paired = self._inputs.read(self._rows[index], picture.size, size)
        cut = cut_by(*picture.size, size)
        return ImageItem(pixels, self.label(index), name, semantic_map, cut, paired)

    def uncropped(self, index: int) -> np.ndarray:
        """The numbers of image `index` before its crop, [H, W, C]; raises what reading it raises."""
        with _decoding(name := self.name(index)), room_for(self._store.held_bytes(self._paths[index])):
            return read_raster(self._store.read(self._paths[index]), name, self.pixel_format)[0].numbers

    def with_format(self, pixel_format: PixelFormat) -> ImageFiles:
        """The same images, read in another format."""
        other = copy.copy(self)
        other.pixel_format = pixel_format
        return other

    def with_input_format(self, pixel_format: PixelFormat) -> ImageFiles:
        """The same images, whose paired inputs are read in another format."""
        assert self._inputs is not None
        other = copy.copy(self)
        other._inputs = self._inputs.with_format(pixel_format)
        return other

    @property
    def inputs_alone(self) -> InputsAlone:
        """The paired inputs as images, to find out what they hold."""
        return InputsAlone(self)

    def input_name(self, index: int) -> str:
        """The path of the paired input of image `index`."""
        assert self._inputs is not None
        return self._inputs.name(self._rows[index])

    def uncropped_input(self, index: int) -> np.ndarray:
        """The stored values of the input of image `index`, [H, W, c]; raises what reading it raises."""
        assert self._inputs is not None
        with _decoding(self.input_name(index)):
            return self._inputs.picture(self._rows[index]).numbers

    def stored_input_format(self, index: int) -> PixelFormat:
        """What the header of the input of image `index` says of its numbers; raises what reading it raises."""
        assert self._inputs is not None
        with _decoding(self.input_name(index)):
            return self._inputs.stored_format(self._rows[index])

    def stored_format(self, index: int) -> PixelFormat:
        """What the header of image `index` says of its numbers; raises what reading it raises."""
        return self.file_facts(index).pixel_format

    def file_facts(self, index: int) -> FileFacts:
        """What the header of image `index` says; raises what reading it raises."""
        return _facts_of(partial(self._store.read, self._paths[index]), self.name(index))

    def picture_size(self, index: int) -> Size:
        """What the header of image `index` says of its upright height and width; raises what reading it raises."""
        return self.file_facts(index).upright_size

    def label(self, index: int) -> int | None:
        """The label of image `index`, without decoding it."""
        row = self._rows[_checked(index, self)]
        return None if self._labels is None else int(self._labels[row])

    def _unsaid_class(self, index: int) -> str:
        """The class of an image if its first folder is another; a table may change it while the file stays."""
        name = self.class_names[self.label(index)]
        return "" if self.name(index).startswith(f"{name}/") else f" class {name}"

    def values(self, index: int) -> tuple[ColumnValue, ...]:
        """The value of each column for image `index`, without decoding it."""
        row = self._rows[_checked(index, self)]
        return tuple(values[row] for values in self._values)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_contents": None}  # which worker processes do not need


class InputsAlone:
    """The paired inputs of some images as images themselves, as far as `choose_format` looks at them."""

    def __init__(self, images: ImageFiles):
        self.images = images

    @property
    def pixel_format(self) -> PixelFormat:
        assert self.images.input_format is not None
        return self.images.input_format

    @property
    def description(self) -> str:
        return f"the paired inputs of {self.images.description}"

    def __len__(self) -> int:
        return len(self.images)

    def uncropped(self, index: int) -> np.ndarray:
        return self.images.uncropped_input(index)

    def name(self, index: int) -> str:
        return self.images.input_name(index)

    def stored_format(self, index: int) -> PixelFormat:
        return self.images.stored_input_format(index)

    def with_format(self, pixel_format: PixelFormat) -> InputsAlone:
        return InputsAlone(self.images.with_input_format(pixel_format))


class LmdbImages:
    """The images of an LMDB environment, unlabelled; see `stores.lmdb` for layouts and order.

    A name is the key, with bytes that are not printable ASCII, and "%", written as %xx.
    """

    class_names = map_class_names = map_palette = columns = ()
    input_format, input_origin = None, ""

    def __init__(self, store: LmdbStore, image_size: Size):
        self.image_size, self.pixel_format = image_size, PixelFormat()
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
        return self.cropped(index, self.image_size)

    def cropped(self, index: int, size: Size) -> ImageItem:
        """See `ImageFiles.cropped`."""
        name = self.name(index)
        with _decoding(name):
            picture, _ = read_raster(self._store.read(self._store.keys[index]), name, self.pixel_format)
            pixels = picture.cropped(partial(center_crop, size=size))
        return ImageItem(pixels, None, name, cut=cut_by(*picture.size, size))

    def uncropped(self, index: int) -> np.ndarray:
        """See `ImageFiles.uncropped`."""
        with _decoding(name := self.name(index)):
            return read_raster(self._store.read(self._store.keys[index]), name, self.pixel_format)[0].numbers

    def with_format(self, pixel_format: PixelFormat) -> LmdbImages:
        """The same images, read in another format."""
        other = copy.copy(self)
        other.pixel_format = pixel_format
        return other

    def stored_format(self, index: int) -> PixelFormat:
        """See `ImageFiles.stored_format`."""
        return self.file_facts(index).pixel_format

    def file_facts(self, index: int) -> FileFacts:
        """See `ImageFiles.file_facts`."""
        name = self.name(index)
        return _facts_of(partial(self._store.read, self._store.keys[index]), name)

    def picture_size(self, index: int) -> Size:
        """See `ImageFiles.picture_size`."""
        return self.file_facts(index).upright_size


def _facts_of(read: Callable[[], bytes], name: str) -> FileFacts:
    with _decoding(name), open_stored(read(), name) as stored:
        return FileFacts(stored.kind, stored.size, stored.upright_size, stored.pixel_format)


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
