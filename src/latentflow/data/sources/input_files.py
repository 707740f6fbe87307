"""Paired inputs in files: images/a/x.jpg goes with inputs/a/x.png."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from latentflow.data.packed import PackedText
from latentflow.data.pictures.crop import center_crop
from latentflow.data.pictures.decode import BrokenImage
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

    Raises:
        DataError: images and inputs do not pair up.
    """

    pixel_format = PixelFormat()

    def __init__(self, store: FileStore, inputs: dict[str, StoredFile], images: list[str]):
        self._store = store
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
        name = f"its input inputs/{self._names[index]}"
        try:
            picture, _ = read_raster(self._store.read(self._paths[index]), name, self.pixel_format)
        except BrokenImage as error:
            raise DataError(str(error)) from error
        require_same_aspect(name, picture.size, image_size)
        return picture.cropped(partial(center_crop, size=size))

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
