"""A picture in the pixel format of its data set, before its crop.

Colours of 8 bits are one Pillow image, RGB or RGBA; other numbers are one image of mode F or L for each channel, which
holds 16 bits exactly. So one rule crops and resizes all of them.

Legend: H and W height and width of the picture, h and w those of its crop, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from latentflow.console import notice
from latentflow.pixel_format import FULL_RANGE, PixelFormat, PixelMode

_LUMA = (0.299, 0.587, 0.114)  # of ITU-R BT.601, as Pillow has it
_SHORT = {"uint8": "8 bits", "uint16": "16 bits", "float32": "floating-point numbers"}


@dataclass(frozen=True)
class Raster:
    """A picture as Pillow images of one size, whose channels follow one another.

    Attributes:
        planes: the images.
        pixel_format: what their numbers are.
    """

    planes: tuple[Image.Image, ...]
    pixel_format: PixelFormat

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.planes[0].size

    @property
    def numbers(self) -> np.ndarray:
        """Its stored values, [H, W, C]."""
        parts = [np.atleast_3d(np.asarray(plane)) for plane in self.planes]
        values = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
        return values.astype(self.pixel_format.dtype, copy=False)

    def cropped(self, crop: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
        """Its crop, [h, w, C] stored values, none of which lies outside those of the picture where they exceed 8 bits.

        Args:
            crop: makes [h, w] or [h, w, c] of each plane, [H, W].

        Raises:
            ValueError: what `crop` raises.
        """
        parts = [np.atleast_3d(_within(plane, crop(plane))) for plane in self._weighted()]
        values = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
        if self._is_weighted:
            alpha = np.maximum(values[..., -1:], 1e-6)
            values = np.concatenate([values[..., :-1] / alpha, values[..., -1:]], axis=2)
        dtype = self.pixel_format.dtype
        if values.dtype == np.float32 and dtype != "float32":
            values = np.rint(values).clip(*FULL_RANGE[dtype])
        return values.astype(dtype, copy=False)

    @property
    def _is_weighted(self) -> bool:
        """Whether colours count by their opacity where pixels are mixed; Pillow does that for 8 bits."""
        return self.pixel_format.has_alpha and len(self.planes) > 1

    def _weighted(self) -> tuple[Image.Image, ...]:
        if not self._is_weighted:
            return self.planes
        alpha = np.maximum(np.asarray(self.planes[-1]), 1e-6)
        return (*(Image.fromarray(np.asarray(plane) * alpha) for plane in self.planes[:-1]), self.planes[-1])


def _within(plane: Image.Image, values: np.ndarray) -> np.ndarray:
    """Resized numbers without what bicubic filters make beyond the picture's own; Pillow clips 8 bits itself."""
    return values.clip(*plane.getextrema()) if plane.mode == "F" else values


def as_raster(values: np.ndarray, mode: PixelMode, pixel_format: PixelFormat, name: str) -> Raster:
    """The numbers of a file in the pixel format of its data set.

    Gray becomes colours by repetition, colours become gray by their brightness. Transparent parts are laid on white,
    the upper end of the range, unless the format keeps them. 8 bits become 16 by a factor of 257, 16 bits become 8 by
    rounding, so that white stays white; floating-point formats keep every number.

    Args:
        values: [H, W, C] uint8, uint16 or float32.
        mode: of the file.
        name: for notices.

    Raises:
        ValueError: it does not fit the format, or some numbers are not finite.
    """
    if values.dtype == np.float32:
        _require_finite(values)
    values = _in_channels(_in_depth(values, pixel_format), mode, pixel_format, name)
    if pixel_format.dtype == "uint8" and values.shape[2] > 1 and pixel_format.mode != "bands":
        return Raster((Image.fromarray(values),), pixel_format)
    dtype = np.uint8 if pixel_format.dtype == "uint8" else np.float32
    planes = (Image.fromarray(np.ascontiguousarray(plane, dtype)) for plane in np.moveaxis(values, 2, 0))
    return Raster(tuple(planes), pixel_format)


def _require_finite(values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        count = int((~np.isfinite(values)).sum())
        raise ValueError(f"{count:,} of its {values.size:,} numbers are NaN or infinite; fill them, or crop them away")


def _in_depth(values: np.ndarray, pixel_format: PixelFormat) -> np.ndarray:
    """Numbers [H, W, C] of the dtype of a format."""
    found, wanted = values.dtype.name, pixel_format.dtype
    if found == wanted:
        return values
    if wanted == "float32":
        return values.astype(np.float32)
    if found == "float32":
        raise ValueError(
            f"it has floating-point numbers, and the images are read with {_SHORT[wanted]}; use --depth float"
        )
    if wanted == "uint8":
        return np.rint(values / 257).astype(np.uint8)
    if not pixel_format.is_full_range:
        raise ValueError(
            f"it has 8 bits, and the others 16 with a range of {pixel_format.low} to {pixel_format.high}; "
            "scale it like them, or leave it out"
        )
    return values.astype(np.uint16) * 257


def _in_channels(values: np.ndarray, mode: PixelMode, pixel_format: PixelFormat, name: str) -> np.ndarray:
    """Numbers [H, W, C] in the channels of a format."""
    wanted, found = pixel_format.mode, values.shape[2]
    if wanted == "bands":
        if found != pixel_format.channels:
            raise ValueError(f"it has {found} channels, and the images are read as {pixel_format.channels} bands")
        return values
    if mode == "bands" and pixel_format.has_alpha and found == pixel_format.channels:
        mode = wanted  # as it is asked for: a TIFF does not say it in a way to rely on
    colours, alpha = values, None
    if mode in ("gray-alpha", "rgba"):
        colours, alpha = values[..., :-1], values[..., -1:]
    if mode == "bands":
        if found < 3 or wanted not in ("rgb", "rgba"):
            raise ValueError(f"it has {found} bands, and the images are read as {wanted}; use --pixels bands")
        notice(
            f"{name} has {found} bands, of which the first three are taken as red, green and blue, as in all such "
            "files; --pixels bands keeps all of them",
            kind="bands as colours",
        )
        colours = values[..., :3]
    if wanted.startswith("gray") and colours.shape[2] == 3:
        colours = _rounded(colours.astype(np.float32) @ np.float32(_LUMA)[:, None], values.dtype)
    if wanted.startswith("rgb") and colours.shape[2] == 1:
        colours = colours.repeat(3, axis=2)
    if not pixel_format.has_alpha:
        return colours if alpha is None else _on_white(colours, alpha, pixel_format)
    if alpha is None:
        alpha = np.full_like(colours[..., :1], FULL_RANGE[pixel_format.dtype][1])
    return np.concatenate([colours, alpha], axis=2)


def _on_white(colours: np.ndarray, alpha: np.ndarray, pixel_format: PixelFormat) -> np.ndarray:
    opacity = alpha.astype(np.float32) / FULL_RANGE[pixel_format.dtype][1]
    white = np.float32(pixel_format.high)
    return _rounded(colours * opacity + white * (1 - opacity), colours.dtype)


def _rounded(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return values.astype(dtype) if dtype == np.float32 else np.rint(values).astype(dtype)
