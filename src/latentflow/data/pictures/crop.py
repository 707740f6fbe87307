"""The central crop of a picture and of its semantic map: the largest part of the wanted shape, scaled to its size.

FID depends on this rule, so it is the same for training images and references.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

from latentflow.sizes import Size

CROP_RULE = "adm-center"
"""The name of this rule, as caches and reports record it."""

_MOST_RESIZED_PIXELS = 1 << 26  # a long, thin strip grows beyond this before it is cropped


def center_crop(image: Image.Image, size: Size | int) -> np.ndarray:
    """The central crop of an image: [height, width, 3] uint8.

    For squares this is the rule of ADM (Dhariwal & Nichol, arXiv 2105.05233), which published FID figures assume: halve
    with a box filter while the shorter side is at least twice that of the result, make it exactly that with a bicubic
    filter, and crop the centre. In general the image is halved while it covers twice the height and width of `size`,
    and scaled to the least size that covers `size`. Smaller images are enlarged.

    Args:
        image: RGB.
        size: of the result.

    Raises:
        ValueError: the image is too long and thin to be enlarged before the crop.
    """
    size = Size.of(size)
    for halved in _halvings(*image.size, size):
        image = image.resize(halved, Image.Resampling.BOX)
    width, height, left, top = _placed(*image.size, size)
    if width * height > _MOST_RESIZED_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too long and thin for {size.words}; crop it first")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.array(image.crop((left, top, left + size.width, top + size.height)))


def crop_map(semantic_map: np.ndarray, size: Size | int) -> np.ndarray:
    """The same crop of a semantic map: [height, width].

    Each pixel takes the class at its centre, so classes are not mixed.

    Args:
        semantic_map: [H, W] of any integers, of the size of its image.
        size: of the result.
    """
    size, (full_height, full_width) = Size.of(size), semantic_map.shape
    *_, halved = (full_width, full_height), *_halvings(full_width, full_height, size)
    width, height, left, top = _placed(*halved, size)
    # Every resize stretches the whole picture, so pixel i of `width` has its centre at (i + 1/2) / width of it.
    columns = (2 * np.arange(left, left + size.width) + 1) * full_width // (2 * width)
    rows = (2 * np.arange(top, top + size.height) + 1) * full_height // (2 * height)
    return semantic_map[rows[:, None], columns]


def cut_by(width: int, height: int, size: Size) -> float:
    """The share of a picture that its crop to the shape of `size` leaves out, in [0, 1)."""
    across, down = width * size.height, height * size.width  # in units in which the crop is as wide as it is high
    return 1 - min(across, down) / max(across, down)


def _halvings(width: int, height: int, size: Size) -> Iterator[tuple[int, int]]:
    """The widths and heights after each halving, while twice `size` is covered."""
    while width >= 2 * size.width and height >= 2 * size.height:
        width, height = width // 2, height // 2
        yield width, height


def _placed(width: int, height: int, size: Size) -> tuple[int, int, int, int]:
    """The least width and height of the picture's shape that cover `size`, and the left and top of the middle."""
    scale = max(size.width / width, size.height / height)
    width, height = round(width * scale), round(height * scale)
    return width, height, (width - size.width) // 2, (height - size.height) // 2
