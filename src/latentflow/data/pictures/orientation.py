"""EXIF orientation: masks and maps of photographs that are stored turned.

A phone stores the pixels as its sensor reads them, and the orientation in EXIF. Photographs are turned upright as they
are read. A mask or map may have been drawn either on the upright picture or on the stored pixels, which OpenCV, labelme
and Pillow can both give.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import ExifTags, Image

from latentflow.data.pictures.decode import orientation
from latentflow.errors import DataError

T = TypeVar("T")

_TURNS = {
    1: "unchanged",
    2: "mirrored",
    3: "rotated by 180 degrees",
    4: "mirrored upside down",
    5: "mirrored and rotated by 90 degrees",
    6: "rotated by 90 degrees",
    7: "mirrored and rotated by 90 degrees",
    8: "rotated by 90 degrees",
}


class Photo(NamedTuple):
    """What a mask or map has to fit.

    Attributes:
        height, width: of the upright picture in pixels.
        turn: EXIF orientation of the stored pixels, 1 to 8; 1 is upright.
    """

    height: int
    width: int
    turn: int = 1


def with_turn(image: Image.Image, make: Callable[[Image.Image], T]) -> tuple[T, int]:
    """The result of `make` for a picture that was just opened, and the picture's EXIF orientation.

    Decoding a TIFF loses its orientation, and asking a PNG for it may decode it.
    """
    turn = orientation(image) if image.format == "TIFF" else 0
    made = make(image)
    return made, turn or orientation(image)


def own_turn(image: Image.Image) -> int | None:
    """The EXIF orientation that a mask or map states itself; None if it does not. Call this before decoding."""
    try:
        turn = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF
        return None
    if image.format == "TIFF":  # turned while decoding; many programs write 1 there by default
        return 1 if turn in range(2, 9) else None
    return turn if turn in _TURNS else None


def turned(pixels: np.ndarray, turn: int) -> np.ndarray:
    """Stored pixels [H, W, ...] as their EXIF orientation says to show them."""
    if turn >= 5:  # rows become columns
        pixels = pixels.swapaxes(0, 1)
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def upright_as(pixels: np.ndarray, own: int | None, photo: Photo, name: str, what: str) -> np.ndarray:
    """Turn a mask or map [H, W, ...] like its photograph.

    Its own EXIF orientation decides if the size then fits; otherwise the size decides.

    Args:
        pixels: as stored.
        own: its own orientation; None: not stated.
        name: for messages.
        what: "mask" or "map", as the remedies call it.

    Raises:
        DataError: it fits neither the upright picture nor the stored pixels, or both and they differ.
    """
    size = (photo.height, photo.width)
    if own is not None and (as_stated := turned(pixels, own)).shape[:2] == size:
        return as_stated
    as_stored = turned(pixels, photo.turn)
    fits_upright, fits_stored = pixels.shape[:2] == size, as_stored.shape[:2] == size
    if fits_upright and fits_stored and not np.array_equal(pixels, as_stored):
        tag = ExifTags.Base.Orientation.value
        raise DataError(
            f"{name} may match its image as shown or as stored: the image has to be "
            f"{_TURNS[photo.turn]} (EXIF orientation {photo.turn}), and both have {photo.width} x {photo.height} "
            f"pixels; say which in the {what}, in Pillow exif = Image.Exif(); exif[{tag}] = 1; "
            f'{what}.save("{what}.png", exif=exif) if it shows the upright image, exif[{tag}] = {photo.turn} if the '
            "stored pixels"
        )
    if fits_upright:
        return pixels
    if fits_stored:
        return as_stored
    raise DataError(_misfit(pixels.shape[0], pixels.shape[1], photo, name, what))


def _misfit(height: int, width: int, photo: Photo, name: str, what: str) -> str:
    """The message for another size, with a remedy that neither swaps sides nor distorts."""
    sizes = f"{name} has {width} x {height} pixels (width x height), its image {photo.width} x {photo.height}"
    stored = (photo.width, photo.height) if photo.turn >= 5 else (photo.height, photo.width)
    for tall, wide in ((photo.height, photo.width), stored):
        if abs(width * tall - height * wide) < max(tall, wide):  # the same shape, up to rounding
            resize = f"{what}.resize(({wide}, {tall}), Image.Resampling.NEAREST)"
            return f"{sizes}: resize the {what} with nearest neighbour, in Pillow {resize}"
    if (height, width) == (photo.width, photo.height):
        ways = " or ".join(f"{what}.transpose(Image.Transpose.ROTATE_{angle})" for angle in (90, 270))
        return f"{sizes}: it is rotated; rotate it back, in Pillow {ways}"
    return f"{sizes}: it has another aspect ratio; make the {what} from this very image"
