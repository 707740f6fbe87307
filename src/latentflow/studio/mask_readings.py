"""Masks as people paint them: soft, transparent, coloured, painted over a copy of the photograph, of another size.

`latentflow.data.painting.mask_reader` refuses what may mean two things. A page can ask: here is all that
it may mean, the likeliest first, to be looked at before one is chosen.

Legend: H and W height and width of the photograph in pixels; a hole is 1 where the photograph is to be filled.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from latentflow.data.pictures.colour import to_rgb
from latentflow.data.pictures.decode import BrokenImage, open_image, upright
from latentflow.errors import DataError

_SAME_SHAPE = 0.02  # of the ratio of sides, which rounding changes
_COLOURED = 48  # of 255 between the channels of a pixel
_ALIKE, _LIKE_SHARE = 24, 0.5  # a copy of the photograph: so many pixels differ from it by less than so much


@dataclass(frozen=True)
class MaskReading:
    """What a mask may mean.

    Attributes:
        title: in words.
        hole: [H, W] uint8 of 0 and 1.
    """

    title: str
    hole: np.ndarray

    @property
    def share(self) -> float:
        """Of the photograph that is filled."""
        return float(self.hole.mean())


def mask_readings(mask: Path, photo: Path) -> list[MaskReading]:
    """All that a mask may mean for a photograph, the likeliest first; none is empty or whole.

    Raises:
        DataError: one of them cannot be read, their shapes differ, or nothing would be filled, or everything.
    """
    pixels, alpha = _pixels(mask)
    photograph = _pixels(photo)[0]
    height, width = photograph.shape[:2]
    found = (pixels.shape[1], pixels.shape[0])
    if abs(found[0] * height - found[1] * width) > _SAME_SHAPE * max(found[0] * height, found[1] * width):
        raise DataError(
            f"the mask {mask.name} has {found[0]} x {found[1]} pixels, the photo {width} x {height}: another shape; "
            "make the mask from this photo"
        )
    resized = "" if found == (width, height) else f", scaled from {found[0]} x {found[1]}"
    readings: list[MaskReading] = []
    for title, hole in _holes(pixels, alpha, photograph):
        fitted = _scaled(hole, (width, height))
        if 0 < fitted.mean() < 1 and not any(np.array_equal(fitted, one.hole) for one in readings):
            readings.append(MaskReading(title + resized, fitted))
    if not readings:
        raise DataError(
            f"the mask {mask.name} is of one colour: nothing of the photo would be filled, or all of it; "
            "paint the part to fill in another colour"
        )
    return readings


def _pixels(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """A picture upright, as [H, W, 3] uint8 sRGB without regard to its opacity, and its opacity [H, W] uint8."""
    try:
        with open_image(file) as image:
            alpha = upright(image).convert("RGBA").getchannel("A") if image.has_transparency_data else None
            if alpha is None:
                rgb = np.asarray(to_rgb(image))
                return rgb, np.full(rgb.shape[:2], 255, np.uint8)
            return np.asarray(upright(image).convert("RGBA"))[..., :3], np.asarray(alpha)
    except BrokenImage as error:
        raise DataError(f"{file.name} cannot be used: {error.reason}; give a picture such as PNG or JPEG") from error


def _holes(pixels: np.ndarray, alpha: np.ndarray, photo: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """What is filled, in words and as [h, w] bool, the likeliest first."""
    if (alpha < 255).any():
        clear = alpha < 128
        both = [("what is transparent is filled", clear), ("what is opaque is filled", ~clear)]
        yield from sorted(both, key=lambda one: one[1].mean())  # a hole is usually the smaller part
    wide = pixels.astype(np.int16)
    coloured = np.ptp(wide, axis=2) >= _COLOURED
    if pixels.shape == photo.shape:
        differs = np.abs(wide - photo).max(2) >= _ALIKE
        if differs.any() and differs.mean() < 1 - _LIKE_SHARE:
            yield "what was painted over the photo is filled", differs
    if coloured.mean() > 0.0005:
        most = _commonest(pixels[coloured])
        yield f"what has the colour {_named(most)} is filled", np.abs(wide - most).max(2) < 96
        ground = _commonest(pixels.reshape(-1, 3))
        yield f"all that is not {_named(ground)} is filled", np.abs(wide - ground).max(2) >= 64
    gray = wide.mean(2)
    soft = " (gray of at least half white counts as white)" if ((gray > 8) & (gray < 247)).mean() > 0.001 else ""
    yield f"what is white is filled{soft}", gray >= 127.5
    yield "what is black is filled", gray < 127.5


def _commonest(colours: np.ndarray) -> np.ndarray:
    """The most frequent colour of [N, 3] uint8, up to small differences: [3] int16."""
    coarse = colours.astype(np.int64) // 16
    values, counts = np.unique(coarse @ (1 << 16, 1 << 8, 1), return_counts=True)
    inside = (coarse @ (1 << 16, 1 << 8, 1)) == values[counts.argmax()]
    return np.median(colours[inside], axis=0).astype(np.int16)


def _named(colour: np.ndarray) -> str:
    red, green, blue = (int(value) for value in colour)
    if max(red, green, blue) < 48:
        return "black"
    if min(red, green, blue) > 207:
        return "white"
    return f"RGB {red}, {green}, {blue}"


def _scaled(hole: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[h, w] bool => [H, W] uint8 by nearest neighbour."""
    image = Image.fromarray(hole.astype(np.uint8))
    return np.asarray(image if image.size == size else image.resize(size, Image.Resampling.NEAREST))


def upright_mask(hole: np.ndarray) -> bytes:
    """The file of a mask [H, W] of 0 and 1 that states that it is upright, whatever the photograph's file says."""
    exif, written = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = 1
    Image.fromarray((hole > 0).astype(np.uint8) * 255).save(written, "PNG", exif=exif, compress_level=1)
    return written.getvalue()


def painted_hole(content: bytes) -> np.ndarray:
    """The mask that the page's canvas holds, from its PNG: [H, W] uint8, 1 where it is white.

    Raises:
        DataError: it is no picture.
    """
    try:
        with open_image(content, "the painted mask") as image:
            return (np.asarray(image.convert("L")) >= 128).astype(np.uint8)
    except BrokenImage as error:
        raise DataError(f"the painted mask cannot be used: {error.reason}") from error
