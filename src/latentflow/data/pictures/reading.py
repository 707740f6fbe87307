"""A picture file in the pixel format of its data set: one rule for training images, references and edits."""

from __future__ import annotations

from PIL import Image

from latentflow.data.pictures.colour import to_rgb, to_srgb
from latentflow.data.pictures.numbers import PillowPicture, open_stored
from latentflow.data.pictures.orientation import with_turn
from latentflow.data.pictures.raster import Raster, as_raster
from latentflow.pixel_format import PixelFormat


def read_raster(content: bytes, name: str, pixel_format: PixelFormat) -> tuple[Raster, int]:
    """A picture, upright, and the EXIF orientation of its file, 1 to 8.

    Formats of 8-bit colours take every file as `to_rgb` makes sRGB of it. Others keep the numbers of the file.

    Args:
        content: of the file.
        name: for notices.

    Raises:
        BrokenImage, ValueError: it cannot be read, or does not fit the format; see `open_stored` and `as_raster`.
    """
    as_colours = pixel_format.dtype == "uint8" and pixel_format.mode != "bands"
    with open_stored(content, name, as_colours=as_colours) as stored:
        if as_colours and isinstance(stored, PillowPicture):
            return with_turn(stored.image, lambda image: _in_colours(image, name, pixel_format))
        values, turn = stored.numbers(raw=pixel_format.mode == "bands")
        return as_raster(values, stored.pixel_format.mode, pixel_format, name), turn


def _in_colours(image: Image.Image, name: str, pixel_format: PixelFormat) -> Raster:
    """What Pillow reads, as 8-bit sRGB or its brightness; on white, unless the format keeps the alpha channel."""
    if not pixel_format.has_alpha:
        rgb = to_rgb(image, name)
        return Raster((rgb if pixel_format.mode == "rgb" else rgb.convert("L"),), pixel_format)
    rgb, alpha = to_srgb(image, name)
    colours = rgb if pixel_format.mode == "rgba" else rgb.convert("L")
    colours.putalpha(Image.new("L", rgb.size, 255) if alpha is None else alpha)
    return Raster((colours,), pixel_format)
