"""Paired inputs in files: images/a/x.jpg goes with inputs/a/x.png."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import numpy as np

from latentflow.data.packed import PackedText
from latentflow.data.pictures.crop import center_crop
from latentflow.data.pictures.decode import BrokenImage
from latentflow.data.pictures.numbers import open_stored
from latentflow.data.pictures.raster import Raster
from latentflow.data.pictures.reading import read_raster
from latentflow.data.sources.maps import pair_files
from latentflow.data.stores.files import FileStore, StoredFile
from latentflow.errors import DataError
from latentflow.pixel_format import PixelFormat
from latentflow.sizes import Size


class InputFiles:
    """The inputs of a set of images: input i belongs to image i.

    Args:
        store: what holds the files.
        inputs: every input by its path below inputs/.
        images: path of each image below images/.

    Attributes:
        pixel_format: what they are read as; 8-bit RGB at first.

    Raises:
        DataError: images and inputs do not pair up.
    """

    def __init__(self, store: FileStore, inputs: dict[str, StoredFile], images: list[str]):
        self._store, self.pixel_format = store, PixelFormat()
        pairs = pair_files(images, inputs, str(store.path), "input")
        self._names = PackedText(pairs[image] for image in images)
        self._paths = PackedText(inputs[name].path for name in self._names)

    def read(self, index: int, image_size: tuple[int, int], size: Size) -> np.ndarray:
        """Input `index`, cropped and resized like its image, to a size: [height, width, c].

        Args:
            image_size: width and height of its upright image in pixels.

        Raises:
            DataError: it cannot be read, or it has another aspect ratio than its image.
        """
        picture = self.picture(index)
        require_same_aspect(f"its input {self.name(index)}", picture.size, image_size)
        return picture.cropped(partial(center_crop, size=size))

    def picture(self, index: int) -> Raster:
        """Input `index` before its crop.

        Raises:
            DataError: it cannot be read.
        """
        name = f"its input {self.name(index)}"
        try:
            return read_raster(self._store.read(self._paths[index]), name, self.pixel_format)[0]
        except (BrokenImage, ValueError) as error:
            raise DataError(f"{name}: {error}" if isinstance(error, ValueError) else str(error)) from error

    def name(self, index: int) -> str:
        """The path of input `index`."""
        return f"inputs/{self._names[index]}"

    def stored_format(self, index: int) -> PixelFormat:
        """What the header of input `index` says of its numbers.

        Raises:
            BrokenImage: it cannot be read.
        """
        with open_stored(self._store.read(self._paths[index]), self.name(index)) as stored:
            return stored.pixel_format

    def with_format(self, pixel_format: PixelFormat) -> InputFiles:
        """The same inputs, read in another format."""
        other = copy.copy(self)
        other.pixel_format = pixel_format
        return other

    def contents(self, indices: Sequence[int]) -> list[str]:
        """Name, size and CRC-32 of each of some inputs."""
        contents = self._store.contents([self._paths[index] for index in indices])
        return [f"{self._names[index]} {content}" for index, content in zip(indices, contents, strict=True)]


def require_same_aspect(name: str, size: tuple[int, int], image_size: tuple[int, int]) -> None:
    """Refuse an input that would not show what its image shows: sides may differ in scale, by a pixel of rounding.

    Args:
        size: width and height of the input in pixels.
        image_size: of its image.

    Raises:
        DataError: with both sizes.
    """
    (width, height), (wide, tall) = size, image_size
    if abs(width * tall - height * wide) > max(wide, tall):
        raise DataError(
            f"{name} has {width} x {height} pixels, its image {wide} x {tall}: another aspect ratio, so they do not "
            "show the same; crop one of them to match"
        )
